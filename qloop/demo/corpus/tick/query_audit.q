/ query_audit.q: one line per request, in memory and on disk
/ ----------------------------------------------------------
/ Wraps the existing .z.pg and .z.ps, so load it after any file that sets
/ them. Disk format is tab separated, one file per day and process:
/   audit/<port>.<date>.log

.aud.dir:`:audit;
.aud.keep:20000;          / requests held in memory
.aud.slowMs:500f;         / anything slower is also printed
.aud.maxText:300;
.aud.day:0Nd;
.aud.fh:0Ni;

.aud.recent:([]time:`timestamp$();user:`symbol$();h:`int$();kind:`symbol$();
  ms:`float$();bytes:`long$();ok:`boolean$();txt:());

/ --- helpers

/ readable, single-line, bounded
.aud.text:{[q]
  s:$[10h=type q;q;.Q.s1 q];
  s:.aud.maxText sublist s;
  @[s;where s in "\t\r\n";:;" "]
 }

/ size of the serialized answer; some objects cannot be serialized
.aud.size:{[x] @[{-22!x};x;{0Nj}]}

.aud.path:{[d] ` sv .aud.dir,`$string[system"p"],".",string[d],".log"}

/ open today's file, closing yesterday's
.aud.roll:{[]
  if[.aud.day=.z.d;:()];
  if[not null .aud.fh;hclose .aud.fh];
  .aud.fh:hopen .aud.path .z.d;
  .aud.day:.z.d;
 }

.aud.line:{[r]
  "\t" sv (string r`time;string r`user;string r`h;string r`kind;
    string r`ms;string r`bytes;string r`ok;r`txt)
 }

.aud.note:{[kind;q;st;res]
  ms:1e-6*"j"$.z.p-st;
  row:cols[.aud.recent]!(st;.z.u;.z.w;kind;ms;.aud.size res 1;res 0;.aud.text q);
  `.aud.recent upsert row;
  .aud.roll[];
  neg[.aud.fh] .aud.line row;
  if[ms>.aud.slowMs;-1 "slow: ",.aud.line row];
 }

/ --- wrapping
/ The original handler runs under protection so that failures are recorded
/ too; the error is then signalled again for the client. Trouble in the audit
/ itself must never reach the client.

.aud.around:{[kind;f;q]
  st:.z.p;
  res:@[{[f;q] (1b;f q)}[f];q;{(0b;x)}];
  .[.aud.note;(kind;q;st;res);{-2 "audit: ",x;}];
  $[res 0;res 1;'res 1]
 }

.z.pg:.aud.around[`sync;@[get;`.z.pg;{value}]];
.z.ps:.aud.around[`async;@[get;`.z.ps;{value}]];

/ --- reports

.aud.byUser:{[]
  select n:count i,failed:sum not ok,total:sum ms,worst:max ms,mb:1e-6*sum bytes
    by user from .aud.recent
 }

.aud.slowest:{[n] n sublist `ms xdesc .aud.recent}

.aud.errors:{[since] select time,user,txt from .aud.recent where time>since,not ok}

/ requests per minute and kind, to see where a burst came from
.aud.load1m:{[] select n:count i,ms:sum ms by 0D00:01 xbar time,kind from .aud.recent}

/ read one of the files back
.aud.readFile:{[d]
  flip cols[.aud.recent]!("PSISFJB*";"\t")0: .aud.path d
 }

/ bring the in-memory part back to its limit
.aud.shrink:{[]
  if[.aud.keep<count .aud.recent;.aud.recent:neg[.aud.keep] sublist .aud.recent];
 }

.z.ts:{[now] .aud.shrink[]}
if[0=system"t";system"t 10000"];
