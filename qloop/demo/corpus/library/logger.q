// Levelled logger.
//
// A message goes through two gates: the process wide threshold first, then the
// minimum level of each handler. A handler is any unary function that takes one
// finished line, so writing to a file, a handle or a table is all the same here.
//
//   .lg.setlevel`debug
//   .lg.addhandler[`daily;`warn;.lg.tofile`:logs]
//   .lg.info"started"
//   .lg.error(`badqty;-5)

\d .lg

levels:`trace`debug`info`warn`error`fatal!til 6
threshold:`info

// the null key keeps both dictionaries general and is never looked up
emitters:(enlist`)!enlist(::)
minlvl:(enlist`)!enlist`fatal
ring:()

checklevel:{[lvl]
  if[not lvl in key levels;'"unknown log level: ",string lvl];
  lvl}

setlevel:{[lvl] .lg.threshold:checklevel lvl;}

addhandler:{[name;lvl;f]
  .lg.minlvl[name]:checklevel lvl;
  .lg.emitters[name]:f;}

delhandler:{[name]
  .lg.minlvl:enlist[name]_minlvl;
  .lg.emitters:enlist[name]_emitters;}

names:{[] key[emitters]except`}

// strings are printed as they are, everything else through .Q.s1
text:{[msg] $[10h=type msg;msg;.Q.s1 msg]}

fmt:{[lvl;msg]
  " "sv(string .z.p;-5$upper string lvl;"[",string[.z.i],"]";text msg)}

// one broken handler must not stop the others
send:{[line;name]
  @[emitters name;line;{[n;e] -2"log handler ",string[n]," failed: ",e;}[name]];}

publish:{[lvl;msg]
  n:levels checklevel lvl;
  if[n<levels threshold;:0b];
  hs:names[];
  hs:hs where n>=levels minlvl hs;
  send[fmt[lvl;msg]]each hs;
  1b}

trace:publish[`trace]
debug:publish[`debug]
info:publish[`info]
warn:publish[`warn]
error:publish[`error]
fatal:publish[`fatal]

// ---- ready made handlers -------------------------------------------------

tostdout:{[line] -1 line;}
tostderr:{[line] -2 line;}

// dir is a file symbol; the file name rolls with the date
tofile:{[dir]
  {[d;line]
    h:hopen ` sv d,`$string[.z.d],".log";
    neg[h] line;
    hclose h;}[dir]}

// keep the last n lines in memory, handy for a status page
toring:{[n]
  {[n;line] .lg.ring:neg[n]sublist .lg.ring,enlist line;}[n]}

// forward to a collector process which defines .collect.line
tohandle:{[h] {[h;line] neg[h](`.collect.line;line);}[h]}

// run f with its argument list at another threshold; the old threshold comes
// back even when f signals, and the signal is passed on to the caller
withlevel:{[lvl;f;args]
  old:threshold;
  setlevel lvl;
  r:.[{(1b;x . y)};(f;args);{(0b;x)}];
  setlevel old;
  $[first r;last r;'last r]}

addhandler[`console;`info;tostdout]
addhandler[`recent;`warn;toring 200]

\d .
