// reports_pivot.q -- the reports everybody asks for: top n, percentiles, pivots
// t is trades: sym time price size ex (ex = venue code)

// ---- top n ---------------------------------------------------------------------
// biggest n prints of each symbol; fby hands every group to the lambda
.rpt.top:{[t;n] select from t where n>({rank neg x};size) fby sym}

// largest n symbols by turnover plus a line for all the others
.rpt.leaders:{[t;n]
  s:0!select notl:sum price*size,prints:count i by sym from t;
  s:`notl xdesc s;
  rest:update sym:`OTHER from select sum notl,sum prints from n _ s;
  r:(n sublist s),cols[s]#rest;
  update pct:100*notl%sum notl,cum:100*(sums notl)%sum notl from r
 }

// ---- percentiles ---------------------------------------------------------------
// nearest rank, nulls left out; ps in 0..1
.rpt.pct:{[ps;x]
  x:asc x where not null x;
  x 0|(-1+count x)&-1+ceiling ps*count x
 }

// one column per percentile, named p50 p95 ..., of column c by column g
.rpt.pctiles:{[t;g;c;ps]
  nm:`$"p",/:string `long$100*ps;
  d:?[t;();g;c];                            // exec c by g: a dictionary of vectors
  v:.rpt.pct[ps] each value d;
  (flip (enlist g)!enlist key d)!flip nm!flip v
 }

// quartiles of activity; the label says which end is which
.rpt.tiers:{[t]
  s:0!select adv:(sum size)%count distinct `date$time by sym from t;
  nm:`low`midlow`midhigh`high;
  update tier:nm[4 xrank adv] from s
 }

// ---- pivots ------------------------------------------------------------------
// rows k, columns the values of p, cells sum of v.  Aggregate first so that every
// (k;p) is unique, then exec P#p!v by k builds one dictionary per row
.rpt.pivot:{[t;k;p;v]
  b:(k,p)!k,p;
  a:0!?[t;();b;(enlist v)!enlist (sum;v)];
  a:@[a;p;{`$string x}];                    // column names must be symbols
  P:asc distinct a p;
  r:?[a;();(enlist k)!enlist k;(#;enlist P;(!;p;v))];
  (key r)!0^value r
 }

// add a total column and a total row to a pivot with symbol row labels
.rpt.totals:{[r]
  k:first cols key r;
  v:value r;
  tot:sum value flip v;
  v:update total:tot from v;
  lab:flip (enlist k)!enlist ((0!r) k),`TOTAL;
  lab!v,sum v
 }

// each row as percentages of its own sum
.rpt.rowpct:{[r]
  v:value r;
  m:flip value flip v;
  (key r)!flip (cols v)!flip 100*m%sum each m
 }

// ---- ready made --------------------------------------------------------------
.rpt.volbyvenue:{[t] .rpt.totals .rpt.pivot[t;`sym;`ex;`size]}

.rpt.byhour:{[t]
  x:update hh:`$"h",/:(-2)#'"0",/:string `hh$time from t;
  .rpt.pivot[x;`sym;`hh;`size]
 }

// concentration of a symbol's trading over venues: 1 is a single venue
.rpt.hhi:{[t]
  v:0!select vol:sum size by sym,ex from t;
  v:update sh:vol%sum vol by sym from v;
  select hhi:sum sh*sh,venues:count i,main:ex[sh?max sh] by sym from v
 }

// print-size distribution: counts in powers of ten
.rpt.sizes:{[t]
  edges:1 10 100 1000 10000 100000 1000000;
  select n:count i,vol:sum size by band:edges[edges bin size] from t where size>0
 }

// ---- try it --------------------------------------------------------------------
tt:([] sym:`A1`A1`B2`B2`B2; ex:`X`Y`X`X`Z;
  time:2024.03.04D10:00+0D00:25*til 5; price:5 5.1 8 8.2 8.1; size:100 300 200 50 1000)
show .rpt.volbyvenue tt
show .rpt.pctiles[tt;`sym;`price;0.5 0.95]
