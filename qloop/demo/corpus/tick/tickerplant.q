/ tickerplant.q - journal every update, then fan it out to subscribers
/   q tickerplant.q -p 5010 -journal journal -batch 100
/ -batch 0 publishes each update at once; otherwise the value is the
/ timer period in milliseconds and updates are collected in between.

system"l market_schema.q";

\d .tp

opts:.Q.def[`journal`batch!(`journal;0)] .Q.opt .z.x
dir:hsym opts`journal
batch:opts`batch
tabs:.schema.names
subs:([]tbl:`symbol$();h:`int$();syms:())
day:.z.d
seq:0      / messages in today's journal
jfile:`    / its path
jh:0Ni     / its handle

openJournal:{[d]
  jfile::` sv dir,`$"capture.",string d;
  if[()~key jfile;jfile set ()];
  n:-11!(-2;jfile);
  / a pair means a torn tail: (good messages;good bytes)
  if[1<count n;'"journal damaged after message ",string first n];
  seq::n;
  jh::hopen jfile;
 }

/ what a subscriber needs in order to replay: -11! takes this pair as it is
info:{[] (seq;jfile)}

drop:{[t;w] delete from `.tp.subs where tbl=t,h=w}

/ remote entry point. ` as table means all tables, ` as syms means all symbols.
/ Buffered rows are already journalled, so they are flushed first; otherwise
/ a new subscriber would see them in the replay and again in the next batch.
sub:{[t;s]
  if[t~`;:.z.s[;s] each tabs];
  if[not t in tabs;'"not published: ",string t];
  flush[];
  drop[t;.z.w];
  `.tp.subs upsert `tbl`h`syms!(t;.z.w;(),s);
  (t;0#value t)
 }

pick:{[d;s] $[s~enlist`;d;select from d where sym in s]}

send:{[t;d;w;s]
  if[not count r:pick[d;s];:()];
  @[neg w;(`upd;t;r);{[w;e] -2 "publish to ",string[w]," failed: ",e;}[w]];
 }

pub:{[t;d]
  if[not count d;:()];
  r:select h,syms from subs where tbl=t;
  send[t;d]'[r`h;r`syms];
 }

/ feeds send columns without time; a single record may be a list of atoms
stamp:{[t;x]
  if[98h=type x;:cols[t] xcols update time:.z.p from x];
  if[0>type first x;x:enlist each x];
  flip cols[t]!enlist[count[first x]#.z.p],x
 }

upd:{[t;x]
  if[not t in tabs;'"unknown table ",string t];
  if[day<.z.d;rollover[]];
  d:stamp[t;x];
  jh enlist(`upd;t;d);
  seq::seq+1;
  $[batch;t insert d;pub[t;d]];
 }

flush:{[] {pub[x;value x];x set 0#value x} each tabs; }

rollover:{[]
  flush[];
  (neg exec distinct h from subs)@\:(`endofday;day);
  hclose jh;
  day::.z.d;
  openJournal day;
 }

\d .

.z.pc:{[w] delete from `.tp.subs where h=w}
.z.ts:{[now] if[.tp.day<.z.d;.tp.rollover[]];.tp.flush[]}
.z.exit:{[code] if[not null .tp.jh;hclose .tp.jh]}

.tp.openJournal .tp.day;
system"t ",string $[.tp.batch;.tp.batch;1000];
