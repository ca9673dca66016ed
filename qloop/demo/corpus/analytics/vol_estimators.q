/ Volatility from daily bars and from ticks.  Everything annualised with .vol.yr
/ trading days; daily input needs open high low close, one symbol, oldest first.

.vol.yr:252f
.vol.ann:{sqrt .vol.yr*x}                       / daily variance -> annual volatility
.vol.ret:{1_log x%prev x}

/ close to close, sample variance
.vol.cc:{[c] .vol.ann svar .vol.ret c}

/ range estimators: same target, much less noise, if the path is continuous
.vol.parkinson:{[b]
  hl:log b[`high]%b`low;
  .vol.ann avg[hl*hl]%4*log 2
 }

.vol.gk:{[b]                                    / Garman-Klass, assumes no drift
  hl:log b[`high]%b`low;
  co:log b[`close]%b`open;
  .vol.ann avg (0.5*hl*hl)-co*co*-1+2*log 2
 }

.vol.rs:{[b]                                    / Rogers-Satchell, any drift
  ho:log b[`high]%b`open; hc:log b[`high]%b`close;
  lo:log b[`low]%b`open;  lc:log b[`low]%b`close;
  .vol.ann avg (ho*hc)+lo*lc
 }

.vol.yz:{[b]                                    / Yang-Zhang, with the overnight jump
  n:-1+count b;
  on:1_log b[`open]%prev b`close;
  oc:1_log b[`close]%b`open;
  k:0.34%1.34+(n+1)%n-1;
  rs:(.vol.rs 1_b) xexp 2;
  sqrt (.vol.yr*(svar on)+k*svar oc)+rs*1-k
 }

/ all of them side by side
.vol.table:{[b]
  nm:`cc`parkinson`gk`rs`yz;
  v:(.vol.cc b`close;.vol.parkinson b;.vol.gk b;.vol.rs b;.vol.yz b);
  ([] estimator:nm; vol:100*v)
 }

/ exponentially weighted: v' = l*v + (1-l)*r^2, started from the first square
.vol.ewma:{[l;r]
  v:{[l;v;x] (l*v)+x*1-l}[l]\[first r*r;r*r];
  .vol.ann v
 }
/ the built-in ema does the same thing with the complementary weight
.vol.ewma2:{[l;r] .vol.ann ema[1-l;r*r]}

/ decay for a given half-life in observations, and back
.vol.decay:{xexp[0.5;1%x]}
.vol.halflife:{(log 0.5)%log x}

/ rolling n-day close to close, null until the window is full
.vol.rolling:{[n;r]
  v:.vol.ann mavg[n;r*r];
  @[v;til (n-1)&count v;:;0n]
 }

/ ---- realised measures from ticks: t sym time price ------------------------
/ last price on a w grid, then squared log returns within the day
.vol.grid:{[t;w]
  g:0!select last price by sym,dt:`date$time,bkt:w xbar time from t;
  update r:log price%prev price by sym,dt from g
 }

/ rv picks up jumps, bipower does not: the difference is the jump part
.vol.realised:{[t;w]
  g:.vol.grid[t;w];
  x:select rv:sum r*r,bv:0.5*(acos -1)*sum abs r*prev r,n:count i by sym,dt from g;
  update jump:0|rv-bv,vol:.vol.ann rv from x
 }

/ average over k shifted grids; same sparsity, less luck of the draw
.vol.subsampled:{[t;w;k]
  off:`timespan$((`long$w) div k)*til k;
  f:{[t;w;o] select sym,dt,rv from .vol.realised[update time:time-o from t;w]};
  select rv:avg rv,vol:.vol.ann avg rv by sym,dt from raze f[t;w] each off
 }

/ signature plot: rv against sampling interval; a rise at the fast end is noise
.vol.signature:{[t;s;ws]
  u:select from t where sym=s;
  ws!{[u;w] exec avg vol from .vol.realised[u;w]}[u] each ws
 }
