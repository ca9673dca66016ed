// tca.q : execution quality of parent orders
//
// o  orders   oid sym side start finish qty       side 1 buys, -1 sells
// f  fills    oid time price size
// q  quotes   sym time bid ask                    sorted sym,time with p#sym
// t  market   sym time price size                 idem
//
// Every cost is in basis points, positive = worse than the benchmark.

.tca.bps:{[sd;px;bench] 1e4*sd*(px-bench)%bench}

// mids at the beginning and the end of each order. aj is told to use start (or
// finish) as its time column, so no helper column is needed
.tca.arrive:{[o;q] aj[`sym`start;o;select sym,start:time,arr:0.5*bid+ask from q]}
.tca.depart:{[o;q] aj[`sym`finish;o;select sym,finish:time,dep:0.5*bid+ask from q]}

// market volume and vwap over the life of the order, both ends included
.tca.market:{[o;t]
  src:select sym,start:time,mvol:size,mnotl:size*price from t;
  src:update `p#sym from `sym`start xasc src;
  r:wj1[o`start`finish;`sym`start;o;(src;(sum;`mvol);(sum;`mnotl))];
  delete mnotl from update ivwap:mnotl%mvol from r
 }

.tca.execs:{[f]
  select done:sum size,avgpx:size wavg price,nf:count i,
    ffill:min time,lfill:max time by oid from f
 }

.tca.report:{[o;f;q;t]
  r:.tca.depart[.tca.arrive[o;q];q];
  r:.tca.market[r;t] lj .tca.execs f;
  r:update done:0^done,nf:0^nf from r;
  r:update fillrate:done%qty,part:done%mvol,
    vsarr:.tca.bps[side;avgpx;arr],
    vsvwap:.tca.bps[side;avgpx;ivwap],
    drift:.tca.bps[side;dep;arr] from r;
  // shortfall = cost of what was done + cost of not having done the rest
  update shortfall:(fillrate*0^vsarr)+drift*1-fillrate from r
 }

// notional-weighted roll-up, with the dispersion that an average hides
.tca.summary:{[r]
  x:update notl:done*avgpx from select from r where done>0,not null vsarr;
  select orders:count i,notional:sum notl,
    arrival:notl wavg vsarr,vwap:notl wavg vsvwap,
    medarr:med vsarr,sdarr:dev vsarr,
    wins:100*avg vsarr<0 by sym,side from x
 }

// does cost grow with participation? bands of the interval volume share
.tca.byrate:{[r]
  bands:0 0.01 0.05 0.1 0.2;
  x:select from r where done>0,mvol>0;
  select orders:count i,vsarr:avg vsarr,vsvwap:avg vsvwap,fillrate:avg fillrate
    by floorpart:bands[bands bin part] from x
 }

// the k most expensive orders in currency, not in bps
.tca.worst:{[r;k]
  x:update cash:side*done*avgpx-arr from select from r where done>0;
  k sublist `cash xdesc select oid,sym,side,done,avgpx,arr,vsarr,cash from x
 }

// fill by fill: price against the mid at that instant, i.e. spread capture
.tca.fillcost:{[o;f;q]
  x:f lj `oid xkey select oid,sym,side from o;
  x:aj[`sym`time;`sym`time xasc x;select sym,time,bid,ask from q];
  x:update mid:0.5*bid+ask from x;
  select nf:count i,cost:size wavg .tca.bps[side;price;mid],
    passive:(sum size*0>side*price-mid)%sum size by oid from x where not null mid
 }
