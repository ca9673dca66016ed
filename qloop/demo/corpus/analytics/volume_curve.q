/ intraday volume profile, projections from it, and slicing a parent along it

\d .vc

/ history t: sym time size over several days; w in minutes
/ fractions are averaged over ALL days of the symbol, so a bucket in which nothing
/ traded on some day counts as zero there
hist:{[t;w]
  v:0!select vol:sum size by sym,dt:`date$time,bkt:w xbar `minute$time from t;
  v:update frac:vol%sum vol by sym,dt from v;
  nd:select days:count distinct dt by sym from v;
  c:0!select frac:sum frac by sym,bkt from v;
  c:update frac:frac%days from c lj nd;
  update cum:sums frac by sym from delete days from c
 }

/ smooth a curve with a centred three-point average (ends lean on themselves)
smooth:{[c]
  c:update frac:((frac^prev frac)+frac+frac^next frac)%3 by sym from c;
  c:update frac:frac%sum frac by sym from c;
  update cum:sums frac by sym from c
 }

/ share of the day's volume that is usually done once the bucket holding m has ended
share:{[c;s;m]
  u:select bkt,cum from c where sym=s;
  0f^u[`cum] u[`bkt] bin m
 }

/ volume v has printed by the end of bucket m: what will the day total be?
project:{[c;s;m;v] v%share[c;s;m]}

/ child sizes for qty between minutes a and b: round the cumulative target to lots,
/ then difference, so that rounding never accumulates; the last slice takes the rest
slice:{[c;s;qty;lot;a;b]
  u:select bkt,frac from c where sym=s,bkt within (a;b);
  if[0=count u;'"no curve for ",string s];
  wt:u[`frac]%sum u`frac;
  tgt:lot*floor 0.5+(qty%lot)*sums wt;
  tgt:(-1_tgt&qty),qty;
  update child:deltas tgt from u
 }

/ our share of the market, per bucket and so far; w is a timespan here
part:{[f;t;w]
  m:0!select mkt:sum size by sym,bkt:w xbar time from t;
  x:select our:sum size by sym,bkt:w xbar time from f;
  r:update our:0^our from m lj x;
  update rate:our%mkt,sofar:(sums our)%sums mkt by sym from r
 }

/ cumulative quantity a percent-of-volume algo would reach on market volumes v
pov:{[r;qty;v] {[r;qty;d;v] d+(qty-d)&floor r*v}[r;qty]\[0;v]}

/ first bucket in which such an algo is finished; null if the volume runs out
povend:{[r;qty;v]
  k:pov[r;qty;v]?qty;
  $[k<count v;k;0N]
 }

/ how lopsided is the day: first and last half hour, and the busiest bucket
shape:{[c;open;close]
  select am:sum frac*bkt<open+30,pm:sum frac*bkt>=close-30,
    peak:bkt[frac?max frac] by sym from c
 }

/ tracking error of the volume forecast: day dt's cumulative curve against c
track:{[c;t;dt;w]
  v:0!select vol:sum size by sym,bkt:w xbar `minute$time from t where dt=`date$time;
  v:update act:(sums vol)%sum vol by sym from v;
  r:v ij `sym`bkt xkey select sym,bkt,cum from c;
  r:update err:act-cum from r;
  select worst:max abs err,rmse:sqrt avg err*err by sym from r
 }

\d .

/ c:.vc.smooth .vc.hist[trade;5]
/ .vc.slice[c;`ALFA;25000;100;10:00;11:30]
