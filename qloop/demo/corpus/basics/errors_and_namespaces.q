/ signals, traps, and keeping names apart
\d .app

errs:([]time:`timestamp$();fn:`symbol$();msg:();arg:())
debug:0b

note:{[f;a;e]
  `.app.errs upsert`time`fn`msg`arg!(.z.p;f;e;-3!a);
  e
 }

/ one argument: @; several: .
try1:{[f;x;d] @[f;x;{[d;e] d}[d]]}
try:{[f;xs;d] .[f;xs;{[d;e] d}[d]]}

/ call a function by name, note a failure, and signal it again
call:{[nm;xs]
  $[debug;
    (get nm). xs;
    .[get nm;xs;{[nm;xs;e] note[nm;xs;e]; '"in ",string[nm],": ",e}[nm;xs]]]
 }

/ result or error, as a pair: (1b;value) or (0b;message)
attempt:{[f;x] @[{(1b;x y)}[f];x;{(0b;x)}]}

/ with the stack, for the log (.Q.trp gives it to the handler)
traced:{[f;x] .Q.trp[f;x;{[e;bt] -2"error: ",e,"\n",.Q.sbt bt; `failed}]}

/ checks that read like prose
must:{[ok;msg] if[not ok;'msg]}
mustbe:{[t;x] must[t=type x;"type: wanted ",string[t],", got ",string type x]; x}
notnull:{[x] must[not any null x;"null"]; x}

safediv:{[a;b] must[not b=0;"division by zero"]; a%b}

/ run a dictionary of functions, collect the failures, signal once at the end
runall:{[fs]
  r:attempt[;::]each fs;
  bad:where not r[;0];
  if[count bad;'"; "sv string[bad],'": ",/:r[bad;1]];
  r[;1]
 }

\d .

/ names of a context, and what kind of thing each is
members:{[ns] k!type each get each` sv'ns,'k:key[ns]except`}
functions:{[ns] where 100h=members ns}

/ q).app.try1[{1+x};`a;0N]
/ 0N
/ q).app.attempt[.app.safediv[1];0]
/ 0b
/ "division by zero"
