/
  asof_enrich.q

  Joining trades to quotes.  Things to remember:
    - in aj the LAST key column is the "as of" one; the columns before it match exactly
    - the right-hand table wants time ascending within sym, and p# or g# on sym
    - wj sees the value prevailing on entry to the window, wj1 only what falls inside
    - wj names its result columns after the source columns, so two aggregates of the
      same column need a renamed copy
\

.enr.prep:{update `p#sym from `sym`time xasc x}

/ the quote in force at each trade; the time column stays the trade's
.enr.quoted:{[t;q] aj[`sym`time;t;select sym,time,bid,ask from q]}

/ aj0 brings back the quote's own time, hence the age of the quote
.enr.aged:{[t;q]
  r:aj0[`sym`time;update ttime:time from t;select sym,time,bid,ask from q];
  select sym,time:ttime,qtime:time,age:ttime-time,price,size,bid,ask from r
 }

/ share of trades priced off a quote older than lim
.enr.stale:{[t;q;lim]
  select n:count i,old:avg age>lim,worst:max age by sym from .enr.aged[t;q]
 }

/ a single look-up; returns a dictionary of the remaining columns
.enr.at:{[q;s;ts] q asof `sym`time!(s;ts)}

/ window bounds: a before, b after (both positive timespans)
.enr.win:{[t;a;b] (neg a;b)+\:t`time}

/ best prices on show around each trade, including the quote standing on entry
.enr.range:{[t;q;a;b]
  src:.enr.prep select sym,time,hibid:bid,loask:ask,nq:bid from q;
  wj[.enr.win[t;a;b];`sym`time;t;(src;(max;`hibid);(min;`loask);(count;`nq))]
 }

/ what printed around each event: strictly inside, so wj1
.enr.printed:{[e;t;a;b]
  src:.enr.prep select sym,time,vol:size,notl:price*size,hi:price,lo:price from t;
  r:wj1[.enr.win[e;a;b];`sym`time;e;
    (src;(sum;`vol);(sum;`notl);(max;`hi);(min;`lo))];
  update vwap:notl%vol from r
 }

/ mid at each horizon (whole seconds) after the trade, one column per horizon
.enr.markout:{[t;q;secs]
  m:select sym,time,mid:0.5*bid+ask from q;
  f:{[m;t;h] exec mid from aj[`sym`time;select sym,time:time+0D00:00:01*h from t;m]};
  secs:(),secs;
  t,'flip (`$"mk",/:string secs)!f[m;t] each secs
 }

/ static data hangs off sym; symbols that are unknown keep null columns
.enr.static:{[t;ref] t lj `sym xkey select sym,ccy,lot,sector from ref}

/ ... or drop the rows that have no reference entry at all
.enr.known:{[t;ref] t ij `sym xkey select sym,ccy,lot,sector from ref}

/ worked example
qt:.enr.prep ([] sym:`AA1`AA1`BB2`AA1;
  time:2024.03.04D09:30:00+0D00:00:01*0 5 2 9;
  bid:10 10.1 20 10.2; ask:10.2 10.3 20.4 10.3)
tr:([] sym:`AA1`BB2`AA1;
  time:2024.03.04D09:30:00+0D00:00:01*6 7 12;
  price:10.3 20.1 10.2; size:300 100 500)

show .enr.aged[tr;qt]
show .enr.range[tr;qt;0D00:00:05;0D00:00:00]
show .enr.markout[tr;qt;1 5]
show .enr.at[qt;`AA1;2024.03.04D09:30:06]
