/ pairs_backtest.q : mean reversion of a two-legged spread, vectorised except for the
/ one thing that is truly sequential (the entry/exit state)

/ aligned closes of two names; ej keeps the dates both of them have
.pr.align:{[px;a;b]
  x:select date,pa:close from px where sym=a;
  y:select date,pb:close from px where sym=b;
  `date xasc ej[`date;x;y]
 }

/ rolling hedge ratio of log a on log b, lagged one bar so that it is known in time
.pr.hedge:{[n;x;y]
  mx:mavg[n;x]; my:mavg[n;y];
  c:mavg[n;x*y]-mx*my;
  v:mavg[n;y*y]-my*my;
  prev @[c%v;til (n-1)&count x;:;0n]
 }

.pr.spread:{[t;n]
  t:update la:log pa,lb:log pb from t;
  t:update h:.pr.hedge[n;la;lb] from t;
  t:update s:la-h*lb from t;
  update z:(s-mavg[n;s])%mdev[n;s] from t where not null s
 }

/ AR(1) on the level: ds = a + b*s(-1); half-life in bars, null if not reverting
.pr.halflife:{[s]
  s:s where not null s;
  x:-1_s; d:1_deltas s;
  b:(d cov x)%var x;
  $[(b>-1)&b<0;neg (log 2)%log 1+b;0n]
 }

/ flat: go against a stretch beyond en.  In a trade: stay until inside ex, or until
/ it has stretched beyond stop.  Positions are those decided ON the bar
.pr.state:{[en;ex;stop;p;z]
  $[null z;0;
    p=0;$[(en<=abs z)&stop>abs z;neg `long$signum z;0];
    (ex>=p*neg z)|stop<=abs z;0;
    p]
 }
.pr.positions:{[en;ex;stop;z] .pr.state[en;ex;stop]\[0;z]}

/ earn the next bar's move with the previous decision; the hedge in force is the one
/ of the decision bar as well.  tc is one-way cost per unit of gross, in bps
.pr.pnl:{[t;en;ex;stop;tc]
  t:update pos:.pr.positions[en;ex;stop;z] from t;
  t:update gross:(prev pos)*(la-prev la)-(prev h)*lb-prev lb from t;
  t:update cost:1e-4*tc*(1+abs h)*abs pos-0^prev pos from t;
  t:update net:(0^gross)-0^cost from t;
  update eq:sums net from t
 }

.pr.stats:{[t]
  r:t`net;
  e:t`eq;
  n:sum (0<>p)&differ p:t`pos;
  nm:`trades`total`ann`vol`sharpe`maxdd`exposure;
  nm!(n;last e;252*avg r;(sqrt 252)*dev r;(sqrt 252)*avg[r]%dev r;
    min e-maxs e;avg 0<>t`pos)
 }

/ one row per round trip.  The bar that goes flat still earns (and pays) for the trip
/ it closes, so it is included: in the market now, or on the bar before
.pr.trips:{[t]
  t:update trip:sums (pos<>0)&differ pos from t;
  select entry:first date,leave:last date,side:first pos,bars:count i,
    net:sum net,worst:min sums net by trip from t where (pos<>0)|0<>0^prev pos
 }

/ grid of thresholds; a flat neighbourhood is worth more than a lone peak
.pr.sweep:{[t;ens;exs;tc]
  g:([] en:ens) cross ([] ex:exs);
  g:select from g where ex<en;
  f:{[t;tc;en;ex] .pr.stats .pr.pnl[t;en;ex;6f;tc]};
  g,'f[t;tc]'[g`en;g`ex]
 }

/ t:.pr.spread[.pr.align[daily;`ALFA;`BRAV];60]
/ .pr.halflife t`s
/ .pr.stats .pr.pnl[t;2f;0.5;4f;1f]
/ .pr.sweep[t;1.5 2 2.5;0 0.5 1;1f]
