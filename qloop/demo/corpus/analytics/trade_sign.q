/ trade_sign.q
/ Who was the aggressor?  Tick rule, Lee-Ready, EMO, and what follows from the sign.
/ Signs are ints: 1i buyer-initiated, -1i seller-initiated, 0i not known.

/ uptick 1, downtick -1, zero tick repeats the last sign; leading zeros stay 0
.sgn.tick:{[p]
  d:0^p-prev p;
  0i^fills ?[d=0;0Ni;signum d]
 }

/ Lee-Ready: above the mid is a buy, below is a sell, at the mid the tick rule
/ decides.  lag delays the quotes: trades used to be reported late (5s in the
/ old literature, zero for modern feeds).
.sgn.leeready:{[t;q;lag]
  m:select sym,time:time+lag,bid,ask from q;
  r:aj[`sym`time;update tr:.sgn.tick price by sym from t;m];
  r:update mid:0.5*bid+ask from r;
  delete tr from update side:?[null mid;tr;?[price=mid;tr;signum price-mid]] from r
 }

/ Ellis-Michaely-O'Hara: only trades exactly on the quote use it, the rest go by tick
.sgn.emo:{[t;q]
  r:aj[`sym`time;update tr:.sgn.tick price by sym from t;
    select sym,time,bid,ask from q];
  r:update mid:0.5*bid+ask,side:?[price=ask;1i;?[price=bid;-1i;tr]] from r;
  delete tr from r
 }

/ effective spread in bps, realised spread against the mid hz later, and the
/ difference: what the price moved in the aggressor's favour
.sgn.spreads:{[r;q;hz]
  fut:select sym,xtime:time,fmid:0.5*bid+ask from q;
  r:aj[`sym`xtime;update xtime:time+hz from r;fut];
  r:update eff:2e4*side*(price-mid)%mid,rea:2e4*side*(price-fmid)%mid from r;
  delete xtime from update impact:eff-rea from r
 }

/ size-weighted summary, one row per symbol
.sgn.report:{[r]
  select n:count i,eff:size wavg eff,rea:size wavg rea,impact:size wavg impact,
    buys:(sum size*side>0)%sum size by sym from r where side<>0,not null rea
 }

/ signed volume and order imbalance by time bucket
.sgn.flow:{[r;w]
  f:select net:sum size*side,vol:sum size by sym,bkt:w xbar time from r;
  update imb:net%vol,cnet:sums net by sym from 0!f
 }

/ price response: regress mid changes on signed volume, bucket by bucket
/ (slope and correlation; a crude lambda)
.sgn.lambda:{[r;w]
  f:select net:sum size*side,dm:(last mid)-first mid by sym,bkt:w xbar time from r;
  select lam:(net cov dm)%var net,rho:net cor dm,n:count i by sym from f
 }

/ serial dependence of signs: splitting parent orders makes it positive
.sgn.acf:{[s;lags] s:`float$s; lags!{[s;k] (k _ s) cor (neg k) _ s}[s] each lags}

/ agreement of two rules on the same trades, as a 2-way count
.sgn.agree:{[a;b]
  c:select n:count i by a,b from ([] a:a`side;b:b`side);
  update pct:100*n%sum n from c
 }
