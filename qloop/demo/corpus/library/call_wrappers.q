/ call_wrappers.q
/ Things to put around a function call: a cache in front (.lru), another try
/ after a failure (.retry), a fuse for sick services (.cb), and an ipc client
/ (.ipc) that uses all but the first.

/ =============================== least recently used cache

.lru.cap:1000
.lru.tick:0
.lru.stat:`hit`miss`evicted!0 0 0
.lru.vals:(enlist`)!enlist(::)
.lru.seen:(`symbol$())!`long$()

/ any value as a symbol key
.lru.hash:{[x] `$raze string md5"c"$-8!x}

.lru.has:{[k] k in key .lru.seen}
.lru.touch:{[k] .lru.tick+:1;.lru.seen[k]:.lru.tick;}

.lru.drop:{[k]
  .lru.vals:enlist[k]_.lru.vals;
  .lru.seen:enlist[k]_.lru.seen;}

.lru.evict:{[]
  .lru.drop .lru.seen?min .lru.seen;
  .lru.stat[`evicted]+:1;}

.lru.put:{[k;v]
  if[not .lru.has k;
    while[.lru.cap<=count .lru.seen;.lru.evict[]]];
  .lru.vals[k]:v;
  .lru.touch k;}

/ f makes the value for k when it is not there
.lru.fetch:{[k;f]
  if[.lru.has k;
    .lru.stat[`hit]+:1;
    .lru.touch k;
    :.lru.vals k];
  .lru.stat[`miss]+:1;
  v:f k;
  .lru.put[k;v];
  v}

/ a version of f, of any number of arguments, that remembers its results
.lru.call:{[id;f;args]
  .lru.fetch[` sv id,.lru.hash args;{[f;a;k] f . a}[f;args]]}
.lru.memo:{[id;f] ('[.lru.call[id;f];enlist])}

.lru.clear:{[]
  .lru.vals:(enlist`)!enlist(::);
  .lru.seen:(`symbol$())!`long$();}

/ =============================== retry with growing pauses

/ (1b;result) or (0b;text of the signal)
.retry.try:{[f;args] .[{(1b;x . y)};(f;args);{(0b;x)}]}

.retry.sleep:{[ms] system"sleep ",string ms%1000;}

.retry.go:{[n;ms;f;args]
  r:.retry.try[f;args];
  if[first r;:last r];
  if[n<2;'"gave up: ",last r];
  .retry.sleep ms;
  .z.s[n-1;2*ms;f;args]}

/ =============================== circuit breaker

/ After limit failures in a row calls are refused until cool has passed; then
/ one call is let through, and its outcome closes or reopens the circuit.

.cb.limit:3
.cb.cool:0D00:00:30
.cb.state:([svc:`symbol$()] fails:`long$();failed:`timestamp$())

.cb.good:{[s] `.cb.state upsert(s;0;0Np);}
.cb.bad:{[s] `.cb.state upsert(s;1+0^.cb.state[s;`fails];.z.p);}
.cb.isopen:{[s]
  r:.cb.state s;
  (.cb.limit<=0^r`fails)and .z.p<r[`failed]+.cb.cool}

.cb.call:{[s;f;args]
  if[.cb.isopen s;'"circuit open: ",string s];
  r:.retry.try[f;args];
  $[first r;.cb.good s;.cb.bad s];
  $[first r;last r;'last r]}

/ =============================== ipc client

.ipc.addr:(`symbol$())!`symbol$()
.ipc.h:(`symbol$())!`int$()

.ipc.handle:{[s]
  if[not s in key .ipc.h;
    .ipc.h[s]:.retry.go[3;200;hopen;enlist(.ipc.addr s;2000)]];
  .ipc.h s}

.ipc.drop:{[s]
  @[hclose;.ipc.h s;{[e] 0b}];
  .ipc.h:enlist[s]_.ipc.h;}

.ipc.send:{[s;msg]
  h:.ipc.handle s;
  @[h;msg;{[s;e] .ipc.drop s;'e}[s]]}

.ipc.ask:{[s;msg] .cb.call[s;.ipc.send;(s;msg)]}

/ forget handles which the other side has closed
.z.pc:{[w] .ipc.h:(where w=.ipc.h)_.ipc.h;}
