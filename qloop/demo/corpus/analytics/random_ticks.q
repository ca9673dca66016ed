/ random_ticks.q
/ Synthetic trades, quotes and level-2 deltas: good enough to exercise the joins,
/ the bars and the filters without touching a real feed.
/
/   \l random_ticks.q
/   r:.gen.day[2024.03.04;5000]     5000 quotes and 1000 trades per symbol
/   r`trade

\d .gen

syms:`ALFA`BRAV`CHAR`DELT`ECHO              / made-up names
px0:syms!41.2 118.75 9.36 240.1 66.8        / opening mid of each
tick:0.01
open:09:30:00.000
close:16:00:00.000
pi:acos -1

/ n standard normal draws, Box-Muller; 1-u keeps zero out of the log
norm:{[n] sqrt[-2*log 1-n?1f]*cos 2*pi*n?1f}

/ snap to the tick grid
rnd:{tick*floor 0.5+x%tick}

/ geometric walk of n steps from p with per-step volatility v
walk:{[p;n;v] rnd p*exp sums v*norm n}

/ n sorted times of day; the arcsine law puts most of them near open and close
times:{[n]
  w:0.5*1-cos pi*n?1f;
  span:`long$close-open;
  asc `time$(`long$open)+`long$w*span
 }

/ one symbol's quotes: a mid path with one to three ticks either side
quotes1:{[d;n;s]
  m:walk[px0 s;n;2e-4];
  h:tick*1+n?3;
  tm:d+`timespan$times n;
  ([] sym:n#s; time:tm; bid:m-h; ask:m+h; bsize:100*1+n?20; asize:100*1+n?20)
 }

/ trades lift the ask or hit the bid of a randomly chosen quote, a moment after it
trades1:{[q;n;s]
  r:q asc n?count q;
  up:n?01b;
  sz:100*1+floor 3*exp norm n;             / lognormal sizes, the odd block
  ([] sym:n#s; time:r[`time]+n?0D00:00:00.2; price:?[up;r`ask;r`bid]; size:sz)
 }

/ level-2 deltas around the opening mid; size 0 takes the level away
l2:{[d;n;s]
  sd:n?"BS";
  off:tick*1+n?10;
  p:rnd px0[s]+off*?[sd="B";-1;1];
  sz:(n?0 1 1 1)*100*1+n?9;
  ([] time:d+`timespan$times n; sym:n#s; side:sd; price:p; size:sz)
 }

/ sorted the way aj and wj want it
srt:{update `p#sym from `sym`time xasc x}

/ both tables for date d, n quotes a symbol
day:{[d;n]
  q:raze quotes1[d;n] each syms;
  t:raze {[q;n;s] trades1[select from q where sym=s;n;s]}[q;n div 5] each syms;
  `quote`trade!srt each (q;t)
 }

/ several days in one go, each one starting again from px0
days:{[ds;n]
  r:day[;n] each ds;
  `quote`trade!srt each (raze r@\:`quote;raze r@\:`trade)
 }

/ spoil k prints (a tenth or ten times the price) so the filters have work to do
spoil:{[t;k]
  ix:neg[k]?count t;
  update price:price*k?0.1 10f from t where i in ix
 }

\d .
