/
 hdb_server.q

 Serves the date-partitioned history.

   q hdb_server.q -p 5012 -db /data/hdb

 The working directory becomes the database root, which is why a reload
 is simply "l ." and why all paths below are relative.
\

.hdb.maxDays:400;                   / widest range one request may ask for
.hdb.loadedAt:0Np;

.hdb.init:{[dir]
  if[not count key hsym dir;'"no database in ",string dir];
  system"l ",string dir;
  .hdb.afterLoad[];
 }

.hdb.reload:{[]
  system"l .";
  .hdb.afterLoad[];
 }

/ map absent tables virtually: a table that was introduced last year
/ still answers (with no rows) for older dates
.hdb.afterLoad:{[]
  .Q.bv[];
  .hdb.loadedAt:.z.p;
  -1 string[.z.p]," loaded ",string[count .Q.pv]," partitions, tables: ",", " sv string .Q.pt;
 }

/ par.txt lists the segment roots, one per line; without it the root is here
.hdb.segments:{[]
  $[`par.txt in key`:.;hsym each `$read0`:par.txt;enlist`:.]
 }

/ every date directory on disk, loaded or not
.hdb.onDisk:{[]
  asc d where not null d:"D"$string raze key each .hdb.segments[]
 }

/ weekdays without a partition (2000.01.01 was a Saturday, so mod 7 gives 0 1
/ for the weekend)
.hdb.gaps:{[]
  if[not count .Q.pv;:0#.z.d];
  d:first[.Q.pv]+til 1+last[.Q.pv]-first .Q.pv;
  d where (1<d mod 7) and not d in .Q.pv
 }

/ rows per date
.hdb.counts:{[t] .Q.pv!.Q.cn value t}

/ dates on which the sym column has lost its parted attribute
.hdb.unparted:{[t]
  f:{[t;d] attr get ` sv .Q.par[`:.;d;t],`sym}[t];
  .Q.pv where not `p=@[f;;`missing] each .Q.pv
 }

/ write empty tables where they are missing; needs write permission
.hdb.repair:{[]
  fixed:.Q.chk`:.;
  .hdb.reload[];
  fixed
 }

/ ---- queries

/ gateway entry point, the same shape as the one in the real-time database
.api.range:{[t;s;sd;ed]
  if[not t in .Q.pt;'"not a partitioned table: ",string t];
  if[.hdb.maxDays<1+ed-sd;'"date range too wide"];
  c:enlist (within;`date;(sd;ed));
  if[not all null s;c,:enlist (in;`sym;enlist (),s)];
  ?[t;c;0b;()]
 }

.api.daily:{[s;sd;ed]
  select open:first price,high:max price,low:min price,close:last price,
    vol:sum size,vwap:size wavg price
    by date,sym from trade where date within (sd;ed),sym in s
 }

/ average quoted spread in basis points per half hour of the day
.api.spreadCurve:{[s;d]
  select bps:1e4*avg (ask-bid)%0.5*bid+ask
    by sym,slot:00:30 xbar `minute$time
    from quote where date=d,sym in s,bid>0,ask>bid
 }

/ ---- start: pick up new partitions even if nobody tells us

.z.ts:{[now] if[count .hdb.onDisk[] except .Q.pv;.hdb.reload[]]}

.hdb.init .Q.def[(enlist`db)!enlist`hdb][.Q.opt .z.x]`db;
system"t 600000";
