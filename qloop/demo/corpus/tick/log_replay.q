/ log_replay.q
/ Plays a tickerplant journal back into a function, either as fast as possible
/ or on a simulated clock, for testing a strategy against a recorded day.
/
/   .rp.open[`:journal/capture.2024.01.05;`trade`quote;`ABC`DEF]
/   .rp.handler:{[t;x] ...}
/   .rp.fast[]               everything, now
/   .rp.play 10              ten times real speed, on the timer
/   .rp.seek 0D09:30         jump to a time of day

.rp.msgs:();                  / (time;table;rows) in journal order
.rp.times:0#.z.p;
.rp.pos:0;                    / next message to deliver
.rp.speed:1f;
.rp.wall:.rp.sim:0Np;         / real and simulated start of the run
.rp.handler:{[t;x] };

/ number of intact messages, also when the last write was cut short
.rp.intact:{[f] first -11!(-2;f)}

/ evaluate n messages of journal f with a temporary upd
.rp.through:{[f;n;fn]
  had:`upd in key`.;
  old:$[had;get`upd;(::)];
  `upd set fn;
  r:@[{(1b;-11!x)};(n;f);{(0b;x)}];
  $[had;`upd set old;delete upd from `.];
  $[r 0;r 1;'r 1]
 }

.rp.collect:{[tabs;syms;t;x]
  if[not t in tabs;:()];
  if[not all null syms;x:select from x where sym in syms];
  if[not count x;:()];
  .rp.msgs,:enlist (first x`time;t;x);
 }

.rp.open:{[f;tabs;syms]
  .rp.msgs:();
  .rp.times:0#.z.p;
  .rp.pos:0;
  n:.rp.intact f;
  .rp.through[f;n;.rp.collect[(),tabs;(),syms]];
  if[not count .rp.msgs;:0];
  .rp.times:`s#maxs first each .rp.msgs;
  count .rp.msgs
 }

/ ---- delivery

/ a handler error is reported with the message number and skipped
.rp.deliver:{[i]
  m:.rp.msgs i;
  .[.rp.handler;1_m;{[i;e] -2 "message ",string[i],": ",e;}[i]];
 }

/ deliver everything before index n
.rp.upto:{[n]
  if[n<=.rp.pos;:()];
  todo:.rp.pos+til n-.rp.pos;
  .rp.pos:n;
  .rp.deliver each todo;
 }

.rp.fast:{[]
  st:.z.p;
  .rp.upto count .rp.msgs;
  .z.p-st
 }

.rp.clock:{[] .rp.sim+"n"$"j"$.rp.speed*"j"$.z.p-.rp.wall}

.rp.play:{[speed]
  if[.rp.pos>=count .rp.msgs;'"nothing left to play"];
  .rp.speed:"f"$speed;
  .rp.sim:.rp.times .rp.pos;
  .rp.wall:.z.p;
  system"t 20";
 }

.rp.stop:{[] system"t 0"}

.rp.tick:{[]
  .rp.upto 1+.rp.times bin .rp.clock[];
  if[.rp.pos>=count .rp.msgs;.rp.stop[];-1 "replay finished"];
 }

/ position on the first message at or after a time of day; nothing is delivered
.rp.seek:{[tod]
  target:tod+"p"$"d"$first .rp.times;
  .rp.pos:.rp.times binr target;
 }

.z.ts:{[now] .rp.tick[]}

/ ---- journal surgery

/ copy the messages of some tables to a new journal
.rp.extract:{[src;dst;tabs]
  dst set ();
  h:hopen dst;
  f:{[h;tabs;t;x] if[t in tabs;h enlist (`upd;t;x)];}[h;(),tabs];
  r:@[{(1b;.rp.through . x)};(src;.rp.intact src;f);{(0b;x)}];
  hclose h;
  $[r 0;.rp.intact dst;'r 1]
 }

/ messages and rows per table, without keeping any data
.rp.summary:{[f]
  .rp.stat:([tbl:`symbol$()]msgs:`long$();rows:`long$());
  .rp.through[f;.rp.intact f;{[t;x] .rp.stat+:([tbl:enlist t]msgs:enlist 1;rows:enlist count x)}];
  .rp.stat
 }
