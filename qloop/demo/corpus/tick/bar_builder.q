/ bar_builder.q
/ Subscribes to trades and maintains OHLC bars as they happen. A bar is sent
/ on once its interval is over plus a short grace period; trades that turn up
/ even later are kept apart, they never change a published bar.

/ width and grace come from the command line in seconds: -width 60 -grace 2
.bar.opt:.Q.def[`tp`width`grace!(`$"localhost:5010";60;2)] .Q.opt .z.x
.bar.width:.bar.opt[`width]*0D00:00:01
.bar.grace:.bar.opt[`grace]*0D00:00:01

.bar.live:([bucket:`timestamp$();sym:`symbol$()]open:`float$();high:`float$();
  low:`float$();close:`float$();vol:`long$();notional:`float$();n:`long$())
.bar.late:([]time:`timestamp$();sym:`symbol$();price:`float$();size:`long$())
.bar.mark:-0Wp             / buckets before this have been published
.bar.clients:0#0i
bar:0!.bar.live

/ one batch of trades reduced to partial bars
.bar.reduce:{[x]
  select open:first price,high:max price,low:min price,close:last price,
    vol:sum size,notional:sum price*size,n:count i
    by bucket:.bar.width xbar time,sym from x
 }

/ merge partial bars into the live ones. old has one row per partial bar, all
/ null where the bar is new; a null is below everything for | so only the low
/ needs a fill before the comparison
.bar.fold:{[b]
  old:.bar.live key b;
  m:update open:open^old`open,
    high:high|old`high,
    low:low&low^old`low,
    vol:vol+0^old`vol,
    notional:notional+0^old`notional,
    n:n+0^old`n
    from b;
  `.bar.live upsert m;
 }

upd:{[t;x]
  if[not t=`trade;:()];
  x:select time,sym,price,size from x where size>0,price>0;
  isLate:.bar.mark>.bar.width xbar x`time;
  if[any isLate;`.bar.late insert x where isLate];
  ok:x where not isLate;
  if[count ok;.bar.fold .bar.reduce ok];
 }

/ publish and forget everything before the given boundary
.bar.emit:{[lim]
  done:0!select from .bar.live where bucket<lim;
  delete from `.bar.live where bucket<lim;
  .bar.mark:lim;
  if[not count done;:()];
  `bar insert done;
  {[d;w] @[neg w;(`upd;`bar;d);{}]}[done] each .bar.clients;
 }

.bar.tick:{[]
  lim:.bar.width xbar .z.p-.bar.grace;
  if[lim>.bar.mark;.bar.emit lim];
 }

endofday:{[d]
  .bar.emit "p"$d+1;
  -1 string[d],": ",string[count bar]," bars, ",string[count .bar.late]," late trades";
  delete from `bar;
  delete from `.bar.late;
 }

/ ---- for clients

.bar.sub:{[] .bar.clients:distinct .bar.clients,.z.w;bar}

/ finished and current bars together, with vwap
.bar.query:{[s]
  r:bar,0!.bar.live;
  select bucket,sym,open,high,low,close,vol,vwap:notional%vol from r where sym in s
 }

/ coarser bars from finer ones; w must be a multiple of the base width
.bar.rollup:{[w;b]
  select open:first open,high:max high,low:min low,close:last close,
    vol:sum vol,notional:sum notional,n:sum n
    by bucket:w xbar bucket,sym from `bucket xasc b
 }

.z.pc:{[w]
  if[w=.bar.tp;-2 "tickerplant has gone";exit 1];
  .bar.clients:.bar.clients except w;
 }
.z.ts:{[now] .bar.tick[]}

.bar.tp:hopen(hsym .bar.opt`tp;5000)
.bar.tp(`.tp.sub;`trade;`);
system"t 500"
