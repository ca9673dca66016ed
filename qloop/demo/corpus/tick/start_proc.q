/ start_proc.q
/ The only script the supervisor ever runs:
/
/   q start_proc.q -name rdb1 [-config config/procs.csv] [-debug]
/
/ It looks the process up in a table, sets port, timer and garbage collection,
/ redirects output and loads the scripts. Options of the process itself may
/ follow on the same command line; the scripts read them with .Q.opt.
/
/ procs.csv:
/   name,kind,port,timer,gcmode,scripts
/   tp1,tick,5010,100,0,tickerplant.q process_monitor.q
/   rdb1,rdb,5011,0,1,rdb.q access_control.q query_audit.q

.proc.opt:.Q.opt .z.x;
.proc.debug:`debug in key .proc.opt;
.proc.started:.z.p;

/ --- exit codes: 2 wrong usage, 3 script failed, 4 port taken
.proc.die:{[code;m]
  -2 string[.z.p]," FATAL ",m;
  if[.proc.debug;'m];
  exit code
 }

.proc.say:{[m] -1 string[.z.p]," ",string[.proc.name]," ",m;}

/ first value of an option, or the default when it is absent or empty
.proc.arg:{[k;default]
  v:.proc.opt k;
  $[k in key .proc.opt;$[count v;first v;default];default]
 }

/ environment variable with a fallback
.proc.env:{[k;default] $[count v:getenv k;v;default]}

.proc.name:`$.proc.arg[`name;""];
if[null .proc.name;.proc.die[2;"usage: q start_proc.q -name <process>"]];

/ --- configuration

.proc.readConfig:{[path]
  f:hsym `$path;
  if[()~key f;.proc.die[2;"no such file: ",path]];
  `name xkey ("SSJJJ*";enlist ",")0: f
 }

.proc.table:.proc.readConfig .proc.arg[`config;"config/procs.csv"];
if[not .proc.name in exec name from .proc.table;
  .proc.die[2;"unknown process ",string .proc.name]];
.proc.me:.proc.table .proc.name;
.proc.kind:.proc.me`kind;

/ --- output: one file per start, so a crash is never overwritten

.proc.redirect:{[dir]
  system"mkdir -p ",dir;
  stamp:ssr[ssr[string .z.p;":";""];".";""];
  base:dir,"/",string[.proc.name],"_",stamp;
  system"1 ",base,".out";
  system"2 ",base,".err";
 }

if[not .proc.debug;.proc.redirect .proc.env[`KDB_LOG_DIR;"logs"]];

/ --- system settings

.proc.listen:{[p]
  @[system;"p ",string p;{[p;e] .proc.die[4;"port ",string[p],": ",e]}[p]];
 }

system"g ",string 0^.proc.me`gcmode;

/ --- scripts, in the order given, each timed

.proc.include:{[f]
  st:.z.p;
  @[system;"l ",f;{[f;e] .proc.die[3;f,": ",e]}[f]];
  .proc.say "loaded ",f," in ",string .z.p-st;
 }

.proc.home:.proc.env[`KDB_CODE_DIR;"."];
.proc.scripts:{[s] s where 0<count each s} " " vs trim .proc.me`scripts;
.proc.include each (.proc.home,"/"),/:.proc.scripts;

/ the port opens last: nobody can call a half-loaded process
if[0<.proc.me`port;.proc.listen .proc.me`port];
if[0<.proc.me`timer;system"t ",string .proc.me`timer];

/ --- leaving

.proc.oldexit:@[get;`.z.exit;{{[c]}}];
.z.exit:{[code]
  @[.proc.oldexit;code;{-2 "exit handler: ",x;}];
  .proc.say "exit ",string[code]," after ",string .z.p-.proc.started;
 }

.proc.say "up, kind ",string[.proc.kind],", pid ",string[.z.i],", port ",string system"p";
