/ adjust_series.q : price series that can be compared across time
/  1. splits and cash dividends for shares
/  2. rolling futures into one continuous series

/ --- 1. shares -----------------------------------------------------------------
/ split table:  sym exdate ratio     (ratio 2 = two new for one old)
/ cash table:   sym exdate amount
/ prices:       sym date close vol

/ every action becomes a factor that multiplies the prices BEFORE its ex-date
.adj.splits:{[sp] select sym,exdate,factor:1%ratio from sp}

/ dividend factor 1-d/c, c being the last close strictly before the ex-date
.adj.cash:{[dv;px]
  r:aj[`sym`date;select sym,date:exdate-1,exdate,amount from dv;
    `sym`date xasc select sym,date,close from px];
  select sym,exdate,factor:1-amount%close from r where not null close
 }

/ step function of date: before the first action all factors apply, from each
/ ex-date on one fewer, after the last none
.adj.steps:{[a]
  a:`sym`exdate xasc 0!select factor:prd factor by sym,exdate from a;
  ungroup select date:(-0Wd,exdate),adj:((reverse prds reverse factor),1f)
    by sym from a
 }

.adj.apply:{[px;a]
  r:aj[`sym`date;px;update `p#sym from .adj.steps a];
  r:update adj:1f^adj from r;
  update aclose:close*adj from r
 }

/ volume only follows the splits, so it is adjusted on its own
.adj.volume:{[px;sp]
  r:.adj.apply[px;.adj.splits sp];
  delete adj,aclose from update avol:vol%adj from r
 }

/ total-return series: splits and dividends together.  Dividends are paid on the
/ share count of their day, hence unadjusted amount over unadjusted close.
.adj.total:{[px;sp;dv] .adj.apply[px;.adj.splits[sp],.adj.cash[dv;px]]}

/ --- 2. futures ----------------------------------------------------------------
/ contracts: sym expiry (one root)       settles: date sym settle

/ front contract on each date, leaving n days before expiry
.roll.front:{[c;n;d]
  c:`expiry xasc c;
  ix:(c[`expiry]-n) binr d+1;            / first contract that rolls after d
  c[`sym] ix
 }

/ stitched but unadjusted; psym is what was held on the previous date
.roll.chain:{[c;p;n]
  r:([] date:asc distinct p`date);
  r:update sym:.roll.front[c;n;date] from r;
  r:r lj `date`sym xkey p;
  update psym:prev sym,pdate:prev date from r
 }

/ roll dates with the two contracts' settles on the last day of the old one
.roll.gaps:{[c;p;n]
  k:`date`sym xkey select date,sym,settle from p;
  x:select date,pdate,psym,sym from .roll.chain[c;p;n] where sym<>psym,not null psym;
  new:(k ([] date:x`pdate; sym:x`sym))`settle;
  old:(k ([] date:x`pdate; sym:x`psym))`settle;
  update old:old,new:new,gap:new-old,ratio:new%old from x
 }

/ back-adjusted: the live contract is left alone and history is moved to meet it,
/ by the sum of the gaps still to come (`diff) or by their product (`ratio)
.roll.cont:{[c;p;n;how]
  r:.roll.chain[c;p;n];
  x:.roll.gaps[c;p;n];
  g:0f^(x[`date]!x`gap) r`date;
  m:1f^(x[`date]!x`ratio) r`date;
  adj:$[how=`diff;(sum g)-sums g;(prd m)%prds m];
  px:$[how=`diff;adj+r`settle;adj*r`settle];
  update cont:px from delete psym,pdate from r
 }
