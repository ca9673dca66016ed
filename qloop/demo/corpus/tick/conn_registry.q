/ conn_registry.q
/ Named outgoing connections. Code asks for a name; this module owns the
/ handle, re-opens it with exponential back-off and runs a hook each time
/ the connection comes up (typically to subscribe again).
/
/   .conn.add[`tp;`::5010;{[h] h(`.tp.sub;`trade;`)}]
/   .conn.sync[`hdb;"count trade"]
/   .conn.async[`tp;(`.tp.upd;`trade;data)]

.conn.tab:([name:`symbol$()]
  addr:`symbol$();
  h:`int$();
  tries:`long$();
  wait:`timespan$();
  due:`timestamp$();
  upSince:`timestamp$());

.conn.hooks:(enlist`)!enlist(::);
.conn.patience:1000;                  / ms allowed for one hopen
.conn.minWait:0D00:00:01;
.conn.maxWait:0D00:02:00;

.conn.add:{[n;a;hook]
  `.conn.tab upsert (n;a;0Ni;0;.conn.minWait;.z.p;0Np);
  .conn.hooks[n]:hook;
  .conn.try n;
 }

.conn.drop:{[n]
  if[not null h:.conn.handle n;hclose h];
  delete from `.conn.tab where name=n;
 }

.conn.handle:{[n] .conn.tab[n;`h]}

/ a little noise keeps a crowd of clients from reconnecting in step
.conn.jitter:{[] rand 0D00:00:00.500}

.conn.try:{[n]
  w:@[hopen;(.conn.tab[n;`addr];.conn.patience);{0Ni}];
  $[null w;.conn.failed n;.conn.opened[n;w]];
 }

.conn.failed:{[n]
  update tries:tries+1,due:.z.p+wait+.conn.jitter[],wait:.conn.maxWait&2*wait
    from `.conn.tab where name=n;
 }

.conn.opened:{[n;w]
  update h:w,tries:0,wait:.conn.minWait,upSince:.z.p from `.conn.tab where name=n;
  @[.conn.hooks n;w;{[n;e] -2 "hook of ",string[n]," failed: ",e;}[n]];
 }

/ ---- calls

.conn.need:{[n]
  h:.conn.handle n;
  if[null h;'"not connected: ",string n];
  h
 }

/ remote errors come back with the connection name in front
.conn.sync:{[n;q]
  h:.conn.need n;
  @[h;q;{[n;e] '"[",string[n],"] ",e}[n]]
 }

.conn.async:{[n;q] neg[.conn.need n] q;}

/ block until the outgoing queue has been written to the socket
.conn.flush:{[n] neg[.conn.need n][];}

/ block until the other side has processed everything sent before
.conn.chase:{[n] .conn.need[n]"";}

/ the remote side works asynchronously but we wait for its message; several
/ servers can compute at the same time if all are asked before any is read
.conn.ask:{[n;q]
  f:{[q] r:@[{(0b;value x)};q;{(1b;x)}];neg[.z.w] r;};
  neg[.conn.need n](f;q);
 }

.conn.read:{[n]
  h:.conn.need n;
  r:h[];
  $[r 0;'"[",string[n],"] ",r 1;r 1]
 }

.conn.scatter:{[names;q]
  .conn.ask[;q] each names;
  names!.conn.read each names
 }

/ ---- upkeep

.conn.lost:{[w]
  update h:0Ni,due:.z.p,upSince:0Np from `.conn.tab where h=w;
 }

.conn.upkeep:{[]
  .conn.try each exec name from .conn.tab where null h,due<=.z.p;
 }

/ keep whatever handler was installed before this file was loaded
.conn.oldpc:@[get;`.z.pc;{{[w]}}];
.z.pc:{[w] .conn.lost w;.conn.oldpc w}
.z.ts:{[now] .conn.upkeep[]}
system"t 500";
