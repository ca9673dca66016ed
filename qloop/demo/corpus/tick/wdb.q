/ wdb.q : write-behind database
/ Takes the same updates as the RDB but keeps almost nothing in memory: when a
/ table grows past its limit the rows are appended to a splayed table in a
/ scratch directory. At end of day the scratch tables are sorted on disk and
/ moved into the HDB, which is a rename if both are on the same file system.
/   q wdb.q -tp localhost:5010 -hdb localhost:5012 -db hdb -scratch wdbtmp

o:.Q.def[`tp`hdb`db`scratch!(`$"localhost:5010";`$"localhost:5012";`hdb;`wdbtmp)] .Q.opt .z.x;

.wdb.db:hsym o`db;
.wdb.scratch:hsym o`scratch;
.wdb.day:.z.d;
.wdb.limit:`trade`quote`depth!50000 200000 200000;   / rows
.wdb.heapLimit:4000000000;                           / bytes
.wdb.written:(0#`)!0#0;
.wdb.tabs:0#`;

.wdb.path:{[t] ` sv .wdb.scratch,(`$string .wdb.day),t,`}

/ append what is in memory; .Q.en keeps the sym file of the real database
.wdb.spill:{[t]
  n:count value t;
  if[not n;:0];
  .wdb.path[t] upsert .Q.en[.wdb.db;value t];
  t set 0#value t;
  .wdb.written[t]:n+0^.wdb.written t;
  n
 }

upd:{[t;x]
  t insert x;
  if[(count value t)>100000^.wdb.limit t;.wdb.spill t];
 }

/ under memory pressure spill everything, biggest first
.wdb.relieve:{[]
  if[.wdb.heapLimit>.Q.w[]`heap;:()];
  n:.wdb.tabs!count each value each .wdb.tabs;
  .wdb.spill each key desc n;
  .Q.gc[];
 }

/ the sort is stable and rows arrived in time order, so sorting by sym is enough
.wdb.finish:{[d;t]
  src:.wdb.path t;
  if[not count key src;src set .Q.en[.wdb.db;0#value t]];
  `sym xasc src;
  @[src;`sym;`p#];
  dst:.Q.par[.wdb.db;d;t];
  if[count key dst;'"already in the database: ",string dst];
  system"mkdir -p ",1_string first ` vs dst;
  system"mv ",(-1_1_string src)," ",1_string dst;
 }

.wdb.reloadHdb:{[]
  h:@[hopen;(hsym o`hdb;2000);{0Ni}];
  if[null h;-2 "hdb is down; it will see the new date when it starts";:()];
  h(`.hdb.reload;::);
  hclose h;
 }

endofday:{[d]
  .wdb.spill each .wdb.tabs;
  bad:{[d;t] .[{.wdb.finish[x;y];`};(d;t);{`$x}]}[d] each .wdb.tabs;
  bad:.wdb.tabs!bad;
  bad:(where not null bad)#bad;
  if[count bad;-2 "left in scratch: ",.Q.s1 bad];
  .wdb.reloadHdb[];
  .wdb.day:d+1;
  .wdb.written:(0#`)!0#0;
 }

/ a restart begins again: the journal holds the whole day, so whatever was
/ spilled before the crash would otherwise be there twice
.wdb.start:{[]
  system"rm -rf ",1_string ` sv .wdb.scratch,`$string .wdb.day;
  .wdb.tp:hopen(hsym o`tp;5000);
  r:.wdb.tp"(.tp.sub[`;`];.tp.info[])";
  .wdb.tabs:first each r 0;
  {[nt] nt[0] set nt 1} each r 0;
  -11!r 1;
 }

.z.pc:{[w] if[w=.wdb.tp;exit 1]}
.z.ts:{[now] .wdb.relieve[]}
.wdb.start[];
system"t 5000";
