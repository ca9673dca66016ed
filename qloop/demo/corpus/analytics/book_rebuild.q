/ Level-2 book from price-level deltas.
/ d: time sym side("B"/"S") price size     size is the NEW total at the price, 0 = gone

/ book of s as of ts, straight from the tape: last word per level wins
.book.snap:{[d;s;ts]
  b:0!select last size by side,price from d where sym=s,time<=ts;
  b:select from b where size>0;
  bid:`price xdesc select price,size from b where side="B";
  ask:`price xasc select price,size from b where side="S";
  `bid`ask!(bid;ask)
 }

/ n levels side by side, short sides padded with nulls
.book.pad:{[n;t] n#t,n#enlist (cols t)!(0n;0N)}
.book.ladder:{[bk;n]
  b:`bpx`bsz xcol .book.pad[n;bk`bid];
  a:`apx`asz xcol .book.pad[n;bk`ask];
  ([] lvl:1+til n),'b,'a
 }

/ --- running top of book ---------------------------------------------------
/ one side is a dictionary price!size; each delta makes the next state
.book.upd:{[lv;p;z] lv[p]:z; (where 0<lv)#lv}

/ pick is max for bids, min for asks.  On an empty side they give -0w and 0w,
/ which fills will not overwrite (a null would be papered over)
.book.best:{[pick;u;sd]
  v:select time,price,size from u where side=sd;
  st:.book.upd\[(0#0f)!0#0;v`price;v`size];
  px:{[f;lv] f key lv}[pick] each st;
  ([] time:v`time; px:px; sz:st@'px)
 }

.book.tob:{[d;s]
  u:`time xasc select from d where sym=s;
  b:`time`bid`bsize xcol .book.best[max;u;"B"];
  a:`time`ask`asize xcol .book.best[min;u;"S"];
  r:update bsize:0^bsize from b;
  r:`time xasc r uj update asize:0^asize from a;
  r:update fills bid,fills ask,fills bsize,fills asize from r;
  r:0!select by time from r;             / several deltas in one packet: keep the last
  update sym:s,bid:?[bid=-0w;0n;bid],ask:?[ask=0w;0n;ask] from r
 }

/ --- measures --------------------------------------------------------------
.book.imb:{[bs;sz] (bs-sz)%bs+sz}                       / -1 all ask .. 1 all bid
.book.micro:{[bp;bs;ap;sz] ((bp*sz)+ap*bs)%bs+sz}       / size-weighted mid

/ cost in bps against mid of sweeping q shares through one side of a snapshot
.book.sweep:{[lv;q;mid]
  take:deltas q&sums lv`size;
  $[q>sum take;0n;1e4*abs -1+(take wavg lv`price)%mid]
 }

/ time-weighted spread and depth per symbol from a top-of-book table
.book.stats:{[q]
  r:update dur:`long$(next time)-time by sym from q;
  r:select from r where not null dur,not null bid,bid<ask;
  r:update mid:0.5*bid+ask,spr:ask-bid from r;
  select spread:dur wavg spr,bps:dur wavg 1e4*spr%mid,
    bdepth:dur wavg bsize,adepth:dur wavg asize,
    tight:(sum dur*spr<=1.0001*min spr)%sum dur,
    imb:dur wavg .book.imb[bsize;asize] by sym from r
 }
