/ rdb.q -- today in memory, written to disk when the tickerplant says so
/   q rdb.q -p 5011 -tp localhost:5010 -hdb localhost:5012 -db hdb

.rdb.arg:.Q.def[`tp`hdb`db!(`$"localhost:5010";`$"localhost:5012";`hdb)] .Q.opt .z.x;
.rdb.db:hsym .rdb.arg`db;
.rdb.tph:0Ni;
.rdb.tabs:0#`;
.rdb.say:{[m] -1 string[.z.p]," rdb ",m;};

upd:{[t;x] t insert x}

/ subscribe to everything and catch up from the journal in one round trip,
/ so that no message can slip in between the two answers
.rdb.start:{[]
  .rdb.tph:@[hopen;(hsym .rdb.arg`tp;5000);{'"tickerplant unreachable: ",x}];
  r:.rdb.tph"(.tp.sub[`;`];.tp.info[])";
  .rdb.tabs:first each r 0;
  {[nt] nt[0] set @[nt 1;`sym;`g#]} each r 0;
  n:-11!r 1;
  .rdb.say "replayed ",string[n]," messages from ",string last r 1;
 }

/ ---- intraday queries

.rdb.snap:{[s] select by sym from quote where sym in s}

.rdb.vwap:{[s;st;et]
  select vwap:size wavg price,vol:sum size,trades:count i by sym
    from trade where sym in s,time within (st;et)
 }

/ each trade with the quote in force at that moment, and the effective spread
.rdb.marked:{[s]
  t:select sym,time,price,size from trade where sym in s;
  q:select sym,time,bid,ask from quote where sym in s;
  update spread:2*abs price-0.5*bid+ask from aj[`sym`time;t;q]
 }

/ common entry point used by the gateway; the HDB has one of the same shape
.api.range:{[t;s;sd;ed]
  c:enlist (within;($;enlist`date;`time);(sd;ed));
  if[not all null s;c:enlist[(in;`sym;enlist (),s)],c];
  r:?[t;c;0b;()];
  `date xcols update date:`date$time from r
 }

/ ---- end of day

.rdb.persist:{[d;t]
  n:count value t;
  .Q.dpft[.rdb.db;d;`sym;t];
  t set @[0#value t;`sym;`g#];
  .rdb.say "wrote ",string[n]," rows of ",string t;
  1b
 }

/ one bad table must not stop the others; its rows stay in memory
.rdb.attempt:{[d;t]
  .[.rdb.persist;(d;t);{[t;e] .rdb.say string[t]," NOT written: ",e;0b}[t]]
 }

.rdb.tellHdb:{[]
  h:@[hopen;(hsym .rdb.arg`hdb;2000);{0Ni}];
  if[null h;:.rdb.say "hdb not reachable, reload it by hand"];
  neg[h](`.hdb.reload;::);
  neg[h][];
  hclose h;
 }

/ sent by the tickerplant with the date that has just finished
endofday:{[d]
  st:.z.p;
  ok:.rdb.attempt[d] each .rdb.tabs;
  if[any ok;.rdb.tellHdb[]];
  freed:.Q.gc[];
  .rdb.say "end of day took ",string[.z.p-st],", returned ",string[freed]," bytes";
 }

/ a supervisor restarts us, and the restart replays the journal
.z.pc:{[w]
  if[w=.rdb.tph;.rdb.say "lost the tickerplant";exit 1];
 }

.rdb.start[];
