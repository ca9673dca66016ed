/ indicators.q
/ Every function takes price vectors and returns vectors of the same length, so that
/ it can be used in "update ... by sym".  Warm-up values are nulled, not guessed.

.ta.warm:{[n;v] @[v;til (n-1)&count v;:;0n]}

.ta.sma:{[n;p] .ta.warm[n] mavg[n;p]}
.ta.ema:{[n;p] .ta.warm[n] ema[2%n+1;p]}
.ta.wilder:{[n;p] ema[1%n;p]}

/ linearly weighted: n on the newest, 1 on the oldest
.ta.wma:{[n;p]
  w:1+til n;
  m:(reverse til n) xprev\:p;            / one row per lag, oldest lag first
  .ta.warm[n] (sum w*m)%sum w
 }

/ Bollinger bands, k standard deviations; pctb 0 on the lower band and 1 on the upper
.ta.boll:{[n;k;p]
  m:.ta.sma[n;p];
  s:mdev[n;p];
  lo:m-k*s; hi:m+k*s;
  ([] mid:m; lo:lo; hi:hi; pctb:(p-lo)%hi-lo; width:(hi-lo)%m)
 }

/ relative strength index with Wilder smoothing
.ta.rsi:{[n;p]
  d:0^p-prev p;
  up:.ta.wilder[n;0|d];
  dn:.ta.wilder[n;0|neg d];
  .ta.warm[n+1] 100-100%1+up%dn
 }

.ta.macd:{[fast;slow;sig;p]
  m:ema[2%fast+1;p]-ema[2%slow+1;p];
  s:ema[2%sig+1;m];
  ([] macd:m; signal:s; hist:m-s)
 }

/ true range needs yesterday's close; on the first bar only high-low exists, and
/ | takes the other side when one is null
.ta.tr:{[h;l;c] pc:prev c; (h-l)|(abs h-pc)|abs l-pc}
.ta.atr:{[n;h;l;c] .ta.warm[n] .ta.wilder[n] .ta.tr[h;l;c]}

/ stochastic oscillator %K and its average %D
.ta.stoch:{[n;d;h;l;c]
  ll:mmin[n;l];
  k:100*(c-ll)%mmax[n;h]-ll;
  ([] k:.ta.warm[n;k]; d:.ta.warm[n+d-1] mavg[d;k])
 }

/ on-balance volume
.ta.obv:{[c;v] sums v*signum 0^c-prev c}

/ rate of change over n bars, percent
.ta.roc:{[n;p] 100*-1+p%n xprev p}

/ efficiency ratio and the adaptive average built on it: the smoothing constant moves
/ between that of a fast and a slow ema, so the recursion cannot use the built-in
.ta.er:{[n;p]
  net:abs p-n xprev p;
  path:msum[n;abs 0^p-prev p];
  0^net%path
 }
.ta.kama:{[n;p]
  f:2%3; s:2%31;
  a:(s+(f-s)*.ta.er[n;p]) xexp 2;
  {[k;a;x] k+a*x-k}\[first p;a;p]
 }

/ 1 on the bar where x crosses above y, -1 where it crosses below, else 0.  Bars on
/ which the two are equal (or not both there yet) keep the side they came from.
.ta.crossing:{[x;y]
  d:x-y;
  s:0^fills ?[(d=0)|null d;0N;`long$signum d];
  s*(s<>0)&s=neg prev s
 }

/ highest high and lowest low of the n bars BEFORE this one
.ta.donchian:{[n;h;l] ([] hi:prev mmax[n;h]; lo:prev mmin[n;l])}

/ ---- put a set of them on bars: sym bar open high low close vol -------------
.ta.add:{[b]
  b:update sma20:.ta.sma[20;close],ema12:.ta.ema[12;close],
    rsi14:.ta.rsi[14;close],atr14:.ta.atr[14;high;low;close],
    roc10:.ta.roc[10;close],obv:.ta.obv[close;vol] by sym from 0!b;
  update trend:?[null sma20;0Ni;signum ema12-sma20],
    stretched:(not null rsi14)&not rsi14 within 30 70f from b
 }

/ functions that return tables go one symbol at a time
.ta.bands:{[b;n;k]
  f:{[b;n;k;s] u:select from b where sym=s; u,'.ta.boll[n;k;u`close]};
  raze f[0!b;n;k] each exec distinct sym from b
 }
