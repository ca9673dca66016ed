/ ====================================================================
/ gateway.q    one address for today's and for historical data
/
/   h:hopen 5030
/   h(`.gw.fetch;`trade;`ABC`DEF;2024.01.02;2024.01.09)      sync
/   neg[h](`.gw.post;`onData;`trade;`ABC;.z.d;.z.d)          async
/
/ No request blocks the process. A sync client is parked with -30! and gets
/ its answer when the last server has replied.
/ ====================================================================

.gw.servers:([name:`symbol$()]addr:`symbol$();kind:`symbol$();h:`int$();busy:`long$());
.gw.jobs:([id:`long$()]client:`int$();cb:`symbol$();start:`timestamp$();want:`long$());
.gw.parts:(enlist 0Nj)!enlist(::);       / job id -> results so far
.gw.seq:0;
.gw.limit:0D00:00:30;

.gw.add:{[n;a;k] `.gw.servers upsert (n;a;k;0Ni;0);}

.gw.connect:{[]
  {[n]
    c:@[hopen;(.gw.servers[n;`addr];500);{0Ni}];
    update h:c,busy:0 from `.gw.servers where name=n;
    } each exec name from .gw.servers where null h;
 }

/ history ends yesterday; today lives in the real-time database
.gw.plan:{[sd;ed]
  p:([]kind:`hdb`rdb;sd:(sd;sd|.z.d);ed:(ed&.z.d-1;ed));
  select from p where sd<=ed
 }

/ connected server of the kind with the fewest requests outstanding
.gw.pick:{[k]
  exec first name from `busy xasc select from .gw.servers where kind=k,not null h
 }

/ runs on the server; never throws, always calls back
.gw.remote:{[j;n;a]
  r:@[{(0b;.api.range . x)};a;{(1b;x)}];
  neg[.z.w](`.gw.done;j;n;r);
 }

.gw.begin:{[cb;t;s;sd;ed]
  p:.gw.plan[sd;ed];
  if[not count p;'"empty date range"];
  srv:.gw.pick each p`kind;
  if[any null srv;'"no server for: ",", " sv string p[`kind] where null srv];
  .gw.seq+:1;
  j:.gw.seq;
  `.gw.jobs upsert (j;.z.w;cb;.z.p;count p);
  .gw.parts[j]:();
  .gw.ask[j;t;s]'[srv;p`sd;p`ed];
 }

.gw.ask:{[j;t;s;n;sd;ed]
  update busy:busy+1 from `.gw.servers where name=n;
  neg[.gw.servers[n;`h]](.gw.remote;j;n;(t;s;sd;ed));
 }

.gw.fetch:{[t;s;sd;ed] .gw.begin[`;t;s;sd;ed];-30!(::)}
.gw.post:{[cb;t;s;sd;ed] .gw.begin[cb;t;s;sd;ed];}

/ called back by the servers
.gw.done:{[j;n;r]
  update busy:0|busy-1 from `.gw.servers where name=n;
  if[not j in exec id from .gw.jobs;:()];
  if[r 0;:.gw.reply[j;1b;r 1]];
  .gw.parts[j],:enlist r 1;
  if[.gw.jobs[j;`want]=count .gw.parts j;
    .gw.reply[j;0b;`date`time xasc (uj/) .gw.parts j]];
 }

.gw.reply:{[j;bad;x]
  r:.gw.jobs j;
  .gw.forget j;
  f:$[null r`cb;{[r;bad;x] -30!(r`client;bad;x)};
    {[r;bad;x] neg[r`client](r`cb;bad;x)}];
  .[f;(r;bad;x);{-2 "client has gone: ",x;}];
 }

.gw.forget:{[j]
  delete from `.gw.jobs where id=j;
  .gw.parts:(key[.gw.parts] except j)#.gw.parts;
 }

.z.pc:{[w]
  update h:0Ni,busy:0 from `.gw.servers where h=w;
  .gw.forget each exec id from .gw.jobs where client=w;
 }

.z.ts:{[now]
  .gw.connect[];
  .gw.reply[;1b;"gateway timeout"] each exec id from .gw.jobs where start<.z.p-.gw.limit;
 }

.gw.add[`rdb1;`::5011;`rdb];
.gw.add[`hdb1;`::5012;`hdb];
.gw.add[`hdb2;`::5013;`hdb];
.gw.connect[];
system"t 2000";
