/ process_monitor.q
/ Load into any server process. Samples memory and outgoing queues, drops
/ subscribers that do not keep up, and shows the figures to a browser:
/   http  /status   one JSON document
/   http  /memory   recent samples as CSV
/   ws    any text  subscribes the page to a push with every sample

.mon.opt:.Q.def[`maxq`strikes`every!(64000000;3;5000)] .Q.opt .z.x;
.mon.since:.z.p;
.mon.rows:5000;

.mon.mem:([]time:`timestamp$();used:`long$();heap:`long$();peak:`long$();
  mmap:`long$();syms:`long$());
.mon.kicked:([]time:`timestamp$();h:`int$();who:`symbol$();queued:`long$());

.mon.names:(0#0i)!0#`;          / handle -> user
.mon.strikes:(0#0i)!0#0;        / handle -> consecutive samples over the limit
.mon.pages:0#0i;                / browsers

/ --- sampling

.mon.sampleMem:{[]
  `.mon.mem insert enlist[.z.p],.Q.w[]`used`heap`peak`mmap`syms;
  if[.mon.rows<count .mon.mem;.mon.mem:neg[.mon.rows div 2] sublist .mon.mem];
 }

/ bytes waiting per handle; sum also flattens the per-message lists
/ that older versions return
.mon.queues:{[] sum each .z.W}

/ A burst may fill a queue for a moment, so a handle is only dropped after
/ several samples in a row. Closing our own side does not fire .z.pc, hence
/ the explicit call that lets other modules clean up.
.mon.checkQueues:{[]
  q:.mon.queues[];
  if[not count q;:()];
  fat:(key q) where .mon.opt[`maxq]<value q;
  .mon.strikes:fat!1+0^.mon.strikes fat;
  .mon.kick[q] each fat where .mon.opt[`strikes]<=.mon.strikes fat;
 }

.mon.kick:{[q;w]
  who:.mon.names w;
  `.mon.kicked insert (.z.p;w;who;q w);
  -2 string[.z.p]," dropping slow client ",string[who]," on ",string[w]," with ",string[q w]," bytes queued";
  @[hclose;w;{-2 "hclose: ",x;}];
  .z.pc w;
 }

/ --- reports

.mon.status:{[]
  k:`pid`port`started`uptime`clients`queued`memory`tables;
  t:tables`.;
  k!(.z.i;system"p";.mon.since;.z.p-.mon.since;count .z.W;sum .mon.queues[];
    .Q.w[];t!{[t] count get t} each t)
 }

/ growth of used memory in bytes per minute over the last n samples
.mon.growth:{[n]
  s:neg[n] sublist .mon.mem;
  if[2>count s;:0f];
  minutes:(1%6e10)*"j"$last[s`time]-first s`time;
  (last[s`used]-first s`used)%minutes
 }

/ --- http and websocket

.mon.page:{[p]
  $[p~"status";.h.hy[`json;.j.j .mon.status[]];
    p~"memory";.h.hy[`csv;"\n" sv csv 0: .mon.mem];
    .h.hn["404 Not Found";`txt;"try status or memory"]]
 }

.z.ph:{[req] .mon.page first "?" vs .h.uh first req}

.z.ws:{[m]
  .mon.pages:distinct .mon.pages,.z.w;
  neg[.z.w] .j.j .mon.status[];
 }
.z.wc:{[w] .mon.pages:.mon.pages except w}

.mon.push:{[]
  if[not count .mon.pages;:()];
  m:.j.j .mon.status[];
  {[m;w] @[neg w;m;{}]}[m] each .mon.pages;
 }

/ --- hooks; earlier handlers keep working

.mon.old:{[n] @[get;n;{{[w]}}]} each `po`pc`ts!`.z.po`.z.pc`.z.ts;
.z.po:{[w] .mon.names[w]:.z.u;.mon.old[`po] w}
.z.pc:{[w]
  .mon.names:(key[.mon.names] except w)#.mon.names;
  .mon.old[`pc] w
 }
.mon.due:.z.p;
.z.ts:{[now]
  .mon.old[`ts] now;
  if[.z.p<.mon.due;:()];
  .mon.due:.z.p+1000000*.mon.opt`every;
  .mon.sampleMem[];
  .mon.checkQueues[];
  .mon.push[];
 }
if[0=system"t";system"t 1000"];
