/ pnl_fx.q  average-cost positions, marked and converted to one reporting currency

/ state is (position;average price;realised).  On the same side the average moves;
/ against it profit is realised and the average stays, unless the position
/ crosses zero and starts afresh at the trade price.
.pnl.step:{[s;n;p]
  q:s 0; a:s 1;
  if[0<=q*n; :(q+n;((q*a)+n*p)%q+n;s 2)];
  c:(abs q)&abs n;
  r:(s 2)+c*(signum q)*p-a;
  m:q+n;
  (m;$[m=0;0f;(abs n)>abs q;p;a];r)
 }

.pnl.run:{[n;p] .pnl.step/[(0;0f;0f);n;p]}

/ f: acct sym time side price size
.pnl.positions:{[f]
  g:0!select n:size*side,p:price by acct,sym from `time xasc f;
  r:.pnl.run'[g`n;g`p];
  (select acct,sym from g),'([] pos:r[;0]; avgpx:`float$r[;1]; rpnl:`float$r[;2])
 }

/ overnight positions plus today's net.  net holds additive columns only, such as
/ pos and rpnl: pj adds every one of them where the key is found.  Symbols with no
/ overnight entry come from the second half.
.pnl.carry:{[sod;net]
  net:`acct`sym xkey net;
  r:(0!sod) pj net;
  r uj select from 0!net where not ([] acct;sym) in key `acct`sym xkey 0!sod
 }

/ mark and leave everything in the instrument's own currency
/ ref: sym ccy mult    mk: sym price
.pnl.mark:{[pos;ref;mk]
  r:(pos lj `sym xkey ref) lj `sym xkey select sym,mark:price from mk;
  update mv:pos*mult*mark,upnl:pos*mult*mark-avgpx,rpnl:rpnl*mult from r
 }

/ ---- fx -----------------------------------------------------------------
/ dollars per unit of each currency from pairs quoted against the dollar either
/ way round: `EURUSD 1.0850 is direct, `USDJPY 150.2 gets inverted
.fx.usd:{[pairs;rates]
  b:`$3#'string pairs;
  c:`$3_'string pairs;
  if[not all (b=`USD)|c=`USD;'"every pair must have a dollar leg"];
  k:?[c=`USD;b;c];
  (`USD,k)!1f,?[c=`USD;rates;1%rates]
 }

/ units of term per unit of base, through the dollar
.fx.rate:{[u;base;term] (u base)%u term}

/ all crosses as a keyed table: row is base, column is term
.fx.matrix:{[u]
  k:key u; v:value u;
  ([] base:k)!flip k!flip v%/:\:v
 }

/ triangular check of a quoted cross against the implied one, in bps
.fx.gap:{[u;base;term;quoted] 1e4*-1+quoted%.fx.rate[u;base;term]}

/ add reporting-currency columns; an unknown currency leaves nulls, and says so
.fx.convert:{[r;u;rep]
  miss:(exec distinct ccy from r) except key u;
  if[count miss;-2 "no rate for: "," " sv string miss];
  r:update fx:.fx.rate[u;ccy;rep] from r;
  update mvrep:fx*mv,uprep:fx*upnl,rprep:fx*rpnl from r
 }

.pnl.report:{[r]
  t:select gross:sum abs mvrep,net:sum mvrep,unreal:sum uprep,real:sum rprep
    by acct from r;
  update total:unreal+real from t
 }

/ u:.fx.usd[`EURUSD`GBPUSD`USDJPY`USDCHF;1.085 1.27 150.2 0.884]
/ .fx.rate[u;`EUR;`JPY]       162.967
/ .pnl.report .fx.convert[.pnl.mark[.pnl.positions fills;ref;marks];u;`EUR]
