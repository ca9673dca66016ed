/ job_scheduler.q
/ Runs functions from the timer: periodically, daily at a given time, or once.
/   .cron.every[`gc;{.Q.gc[]};();0D00:10]
/   .cron.daily[`report;`mkReport;enlist `summary;0D18:30]
/   .cron.once[`warmUp;{[n] count select from n};enlist `trade;.z.p+0D00:01]

.cron.jobs:([id:`long$()]name:`symbol$();fn:();args:();period:`timespan$();
  due:`timestamp$();runs:`long$();fails:`long$();active:`boolean$());

.cron.history:([]id:`long$();name:`symbol$();began:`timestamp$();ms:`float$();msg:());

.cron.seq:0;
.cron.maxFails:5;       / a job that keeps failing is switched off
.cron.historyRows:2000;

/ fn is a function or the name of one; a name is looked up at each run,
/ so redefining the function takes effect at once
.cron.put:{[nm;fn;args;period;due]
  .cron.seq+:1;
  / enlist keeps the fn column general whatever is stored first
  a:$[()~args;enlist (::);(),args];
  v:(.cron.seq;nm;enlist fn;a;period;due;0;0;1b);
  `.cron.jobs upsert (cols .cron.jobs)!v;
  .cron.seq
 }

.cron.every:{[nm;fn;args;period] .cron.put[nm;fn;args;period;.z.p+period]}

.cron.daily:{[nm;fn;args;tod]
  due:.z.d+tod;
  if[due<=.z.p;due:due+1D];
  .cron.put[nm;fn;args;1D;due]
 }

.cron.once:{[nm;fn;args;due] .cron.put[nm;fn;args;0Nn;due]}

.cron.cancel:{[nm] delete from `.cron.jobs where name=nm}
.cron.pause:{[nm] update active:0b from `.cron.jobs where name=nm}
.cron.resume:{[nm] update active:1b,fails:0,due:.z.p|due from `.cron.jobs where name=nm}

/ ---- execution

.cron.call:{[fl;a]
  f:first fl;
  g:$[-11h=type f;get f;f];
  (1b;g . a)
 }

/ next due time on the original grid, skipping slots we were too busy for
.cron.following:{[due;period]
  late:("j"$.z.p-due) div "j"$period;
  due+period*1+late
 }

.cron.fire:{[j]
  r:.cron.jobs j;
  began:.z.p;
  res:.[.cron.call;(r`fn;r`args);{(0b;x)}];
  ms:1e-6*"j"$.z.p-began;
  m:$[res 0;"ok";res 1];
  `.cron.history upsert (cols .cron.history)!(j;r`name;began;ms;m);
  $[null r`period;.cron.finish j;.cron.reschedule[j;r;res 0]];
 }

.cron.finish:{[j] delete from `.cron.jobs where id=j}

.cron.reschedule:{[j;r;ok]
  nd:.cron.following[r`due;r`period];
  nf:$[ok;0;1+r`fails];
  update due:nd,runs:runs+1,fails:nf,active:active and nf<.cron.maxFails
    from `.cron.jobs where id=j;
  if[nf>=.cron.maxFails;-2 "job ",string[r`name]," switched off after ",string[nf]," failures"];
 }

/ a job may cancel another one that was due in the same tick: check again
.cron.tick:{[]
  ids:exec id from `due xasc select id,due from .cron.jobs where active,due<=.z.p;
  {[j] if[j in exec id from .cron.jobs;.cron.fire j]} each ids;
  if[.cron.historyRows<count .cron.history;
    .cron.history:neg[.cron.historyRows div 2] sublist .cron.history];
 }

/ ---- looking at it

.cron.list:{[] select name,period,due,runs,fails,active from `due xasc .cron.jobs}
.cron.cost:{[] select n:count i,avgMs:avg ms,maxMs:max ms by name from .cron.history}
.cron.failures:{[] select from .cron.history where not msg like "ok"}

.z.ts:{[now] .cron.tick[]}
system"t 200";
