/ bars.q -- time, volume and tick bars; filling the holes; rolling bars up
/ input t: sym time price size, time ascending within sym

/ w is a timespan such as 0D00:05
.bar.time:{[t;w]
  select open:first price,high:max price,low:min price,close:last price,
    vol:sum size,vwap:size wavg price,
    twap:.bar.tw[time;price;w+w xbar first time],n:count i
    by sym,bar:w xbar time from t
 }

/ time-weighted price: each print counts until the next one, the last until e
.bar.tw:{[tm;px;e]
  d:`long$(1_tm,e)-tm;
  $[0<sum d;d wavg px;avg px]
 }

/ one bar per v shares; a print that straddles the border stays where it began
.bar.vol:{[t;v]
  c:update done:(sums size)-size by sym from t;
  select start:first time,stop:last time,open:first price,high:max price,
    low:min price,close:last price,vol:sum size,vwap:size wavg price
    by sym,k:done div v from c
 }

/ one bar per n prints
.bar.tick:{[t;n]
  c:update seq:til count i by sym from t;
  select start:first time,open:first price,high:max price,low:min price,
    close:last price,vol:sum size by sym,k:seq div n from c
 }

/ every sym by every bar start in [s;e)
.bar.grid:{[names;w;s;e]
  n:ceiling (e-s)%w;
  ([] sym:names) cross ([] bar:s+w*til n)
 }

/ fill empty bars: last close carried, zero volume.  Bars before the first
/ trade of a symbol have no price to carry and are dropped.
.bar.fill:{[b;w;s;e]
  g:.bar.grid[exec distinct sym from b;w;s;e];
  r:g lj `sym`bar xkey 0!b;
  r:update synth:null close,close:fills close by sym from r;
  r:update open:close^open,high:close^high,low:close^low,
    vwap:close^vwap,twap:close^twap,vol:0^vol,n:0^n from r;
  `sym`bar xkey select from r where not null close
 }

/ coarser bars from finer ones, without going back to the ticks; where nothing
/ traded the vwap falls back on the carried close
.bar.roll:{[b;w]
  select open:first open,high:max high,low:min low,close:last close,
    vwap:(last close)^vol wavg vwap,vol:sum vol,n:sum n
    by sym,bar:w xbar bar from 0!b
 }

/ log returns of bars; the first of each symbol is null
.bar.ret:{[b] update ret:log close%prev close by sym from 0!b}

/ sanity: rows that cannot be right
.bar.bad:{[b]
  select from b where (high<low)|(open>high)|(open<low)|(close>high)|close<low
 }

/ e.g.
/  b:.bar.time[trade;0D00:01]
/  f:.bar.fill[b;0D00:01;2024.03.04D09:30;2024.03.04D16:00]
/  .bar.roll[f;0D00:15]
