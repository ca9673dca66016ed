/ order_recon.q
/ End of day: do our orders, our fills and the broker's fills tell the same story, and
/ how fast was everybody?

/ orders   oid sym side qty limit
/ ours     eid oid sym qty px time
/ theirs   eid sym qty px time          (broker drop copy)
/ events   oid ev time venue            ev in `new`ack`fill`cxl

/ ---- fills against fills ----------------------------------------------------------
.rec.fills:{[ours;theirs]
  b:`eid xkey `eid`bsym`bqty`bpx`btime xcol select eid,sym,qty,px,time from theirs;
  m:ours ij b;
  brk:update dq:qty-bqty,dp:px-bpx,dt:time-btime from m;
  brk:select from brk where (sym<>bsym)|(dq<>0)|1e-8<abs dp;
  a:select eid,sym,qty,px,time from ours where not eid in theirs`eid;
  c:select eid,sym,qty,px,time from theirs where not eid in ours`eid;
  `breaks`onlyours`onlytheirs!(brk;a;c)
 }

/ an id sent twice is worse than one missing: it moves the position
.rec.dups:{[f] select from f where 1<(count;i) fby eid}

/ unmatched on both sides, yet same symbol, quantity and price within tol of time:
/ most likely one fill whose id got mangled
.rec.guess:{[r;tol]
  a:update otime:time from r`onlyours;
  b:select sym,qty,px,time,beid:eid,btime:time from r`onlytheirs;
  k:`sym`qty`px`time;
  x:aj[k;update time:time+tol from a;k xasc b];
  select eid,beid,sym,qty,px,gap:otime-btime from x
    where not null btime,tol>=abs otime-btime
 }

/ ---- orders against fills -----------------------------------------------------------
.rec.orders:{[o;f]
  d:select done:sum qty,avgpx:qty wavg px,lo:min px,hi:max px by oid from f;
  r:update done:0^done from o lj d;
  r:update leaves:qty-done,excess:done>qty from r;
  update through:?[side>0;hi>limit;lo<limit] from r where done>0,not null limit
 }

.rec.orphans:{[o;f] select from f where not oid in exec oid from o}

/ net bought and sold per symbol on each side; uj lines the two up and keeps strays
.rec.nets:{[o;ours;theirs]
  x:ours lj `oid xkey select oid,side from o;
  y:theirs lj `eid xkey select eid,side from x;
  a:select onet:sum side*qty,ocash:sum neg side*qty*px by sym from x;
  b:select bnet:sum side*qty,bcash:sum neg side*qty*px by sym from y;
  r:update 0^onet,0^ocash,0^bnet,0^bcash from a uj b;
  select from r where (onet<>bnet)|0.005<abs ocash-bcash
 }

/ ---- latency ------------------------------------------------------------------------
/ first time of each kind of event, pivoted to one row per order
.rec.stages:{[e]
  x:0!select time:min time by oid,ev from e;
  p:exec `new`ack`fill`cxl#ev!time by oid:oid from x;
  v:select venue:first venue by oid from e;
  update toack:ack-new,tofill:fill-ack from (0!p) lj v
 }

.rec.us:{1e-3*`long$x}                        / timespan -> microseconds, as floats

/ nearest-rank percentile of what is there
.rec.pc:{[p;x]
  x:asc x where not null x;
  $[count x;x 0|-1+ceiling p*count x;0n]
 }

.rec.latency:{[s]
  select n:sum not null toack,p50:.rec.pc[0.5;.rec.us toack],
    p95:.rec.pc[0.95;.rec.us toack],p99:.rec.pc[0.99;.rec.us toack],
    worst:.rec.us max toack,noack:sum null toack by venue from s where not null new
 }

/ histogram over fixed edges; edges with nothing in them still get a line
.rec.hist:{[x]
  edges:0 50 100 250 500 1000 5000f;
  c:count each group edges bin x where not null x;
  ([] from_us:edges; n:0^c til count edges)
 }

/ clocks: an acknowledgement from before the request means they disagree
.rec.skew:{[s]
  select n:count i,worst:min toack by venue from s where not null toack,toack<0D00:00:00
 }
