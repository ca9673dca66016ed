/
 service_discovery.q

 Directory of running processes. The same file serves both sides:

   q service_discovery.q -p 5000 -directory      the directory itself
   system"l service_discovery.q"                 in every other process

 A process announces itself with a kind, sends a heartbeat every few seconds
 and can watch a kind: it is told whenever a member appears or goes away.
 Silence makes a process first suspect, then dead; a closed handle makes it
 dead at once.
\

/ ---------------- the directory

.dir.procs:([h:`int$()]name:`symbol$();kind:`symbol$();addr:`symbol$();
  state:`symbol$();seen:`timestamp$();note:())
.dir.watchers:([]h:`int$();kind:`symbol$())
.dir.suspectAfter:0D00:00:10
.dir.deadAfter:0D00:00:30

/ remote calls; .z.w identifies the caller
.dir.announce:{[name;kind;addr]
  c:`h`name`kind`addr`state`seen`note;
  `.dir.procs upsert c!(.z.w;name;kind;addr;`up;.z.p;"");
  .dir.tell[kind;`up;addr];
 }

/ a beat carries a short text, e.g. row counts, for the people looking
.dir.beat:{[txt]
  r:.dir.procs .z.w;
  if[null r`state;:()];
  if[not `up=r`state;.dir.tell[r`kind;`up;r`addr]];
  update state:`up,seen:.z.p,note:enlist txt from `.dir.procs where h=.z.w;
 }

.dir.find:{[k] exec addr from `seen xdesc select from .dir.procs where kind=k,state=`up}

.dir.watch:{[k]
  if[not count select from .dir.watchers where h=.z.w,kind=k;
    `.dir.watchers insert (.z.w;k)];
  .dir.find k
 }

.dir.tell:{[k;event;addr]
  m:(`.svc.onChange;k;event;addr);
  {[m;w] @[neg w;m;{}]}[m] each exec h from .dir.watchers where kind=k;
 }

.dir.remove:{[w]
  r:.dir.procs w;
  delete from `.dir.procs where h=w;
  delete from `.dir.watchers where h=w;
  if[not null r`name;.dir.tell[r`kind;`down;r`addr]];
 }

.dir.sweep:{[]
  age:exec h!.z.p-seen from .dir.procs;
  dead:where age>.dir.deadAfter;
  quiet:(where age>.dir.suspectAfter) except dead;
  update state:`suspect from `.dir.procs where h in quiet;
  {[w] .dir.remove w;@[hclose;w;{}]} each dead;
 }

/ ---------------- everybody else

.svc.h:0Ni
.svc.addr:`::5000
.svc.me:()
.svc.known:(0#`)!()            / kind -> addresses, kept up to date by events
.svc.note:{[] string[sum count each get each tables`.]," rows"}

.svc.join:{[name;kind]
  here:`$":",string[.z.h],":",string system"p";
  .svc.me:(name;kind;here);
  .svc.connect[];
 }

.svc.connect:{[]
  .svc.h:@[hopen;(.svc.addr;1000);{0Ni}];
  if[null .svc.h;:()];
  neg[.svc.h] enlist[`.dir.announce],.svc.me;
  .svc.watch each key .svc.known;
 }

.svc.watch:{[k]
  .svc.known[k]:$[null .svc.h;0#`;.svc.h(`.dir.watch;k)];
  .svc.known k
 }

.svc.onChange:{[k;event;addr]
  a:.svc.known[k] except addr;
  .svc.known[k]:$[event=`up;a,addr;a];
 }

.svc.pick:{[k]
  if[not count a:.svc.known k;'"nobody provides ",string k];
  rand a
 }

.svc.tick:{[]
  if[not count .svc.me;:()];
  if[null .svc.h;:.svc.connect[]];
  neg[.svc.h](`.dir.beat;.svc.note[]);
 }

.z.pc:{[w] $[w=.svc.h;.svc.h:0Ni;.dir.remove w]}
.z.ts:$[`directory in key .Q.opt .z.x;{[now] .dir.sweep[]};{[now] .svc.tick[]}]
system"t 3000"
