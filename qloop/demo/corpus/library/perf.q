\d .perf

// timing of calls and expressions, memory housekeeping

hist:([]at:`timestamp$();tag:`symbol$();ns:`long$();used:`long$())
marks:(`symbol$())!`timestamp$()

used:{[] .Q.w[]`used}

// call f with its argument list and keep a row about it
timed:{[tag;f;args]
  m:used[];
  t0:.z.p;
  r:f . args;
  ns:`long$.z.p-t0;
  `.perf.hist insert(t0;tag;ns;used[]-m);
  r}

// put a timed version behind a global name, e.g. wrap`.book.apply
// origs lets unwrap undo it
origs:(enlist`)!enlist(::)
wrap:{[nm]
  if[nm in key origs;:0b];
  f:get nm;
  .perf.origs[nm]:f;
  nm set('[timed[nm;f];enlist]);
  1b}
unwrap:{[nm]
  if[not nm in key origs;:0b];
  nm set origs nm;
  .perf.origs:enlist[nm]_origs;
  1b}

summary:{[]
  `totms xdesc select calls:count i,totms:1e-6*sum ns,avgms:1e-6*avg ns,
    maxms:1e-6*max ns,grown:sum used by tag from hist}

slowest:{[n] n sublist`ns xdesc hist}
clear:{[] .perf.hist:0#hist;}

// ---- expressions as text

// n runs; milliseconds in all, and the peak of extra bytes
ts:{[n;ex] `ms`bytes!system"ts:",string[n]," ",ex}

// compare several ways to say the same, fastest first
// cmp[1000;("sum til 1000";"(+/)til 1000")]
cmp:{[n;exs]
  r:([]ex:exs),'ts[n]each exs;
  `ms xasc update rel:ms%1|min ms from r}

// do all of them give the same answer?
agree:{[exs] 1=count distinct value each exs}

// ---- laps: start`load; ...; lap`load gives the time since

start:{[nm] .perf.marks[nm]:.z.p;}
lap:{[nm]
  if[not nm in key marks;'"no mark: ",string nm];
  .z.p-marks nm}

// ---- memory

// bytes for people: human 1536 is "1.5 KB"
human:{[b]
  u:("B";"KB";"MB";"GB";"TB");
  i:4&floor 1024 xlog 1|b;
  .Q.f[1;b%1024 xexp i]," ",u i}

// result of f, and how each figure of .Q.w moved meanwhile
wdiff:{[f;args]
  a:.Q.w[];
  r:f . args;
  d:.Q.w[]-a;
  (r;(where 0<>d)#d)}

// only bother the allocator when the slack is worth it
gcif:{[limit]
  w:.Q.w[];
  $[limit<w[`heap]-w`used;.Q.gc[];0]}

// check every ms milliseconds, after whatever timer was set before
autogc:{[ms;limit]
  old:@[get;`.z.ts;{[e]{[t]}}];
  .z.ts:{[old;limit;t] old t;gcif limit;}[old;limit];
  system"t ",string ms;}

// largest variables of a namespace by serialised size: top[5;`.]
top:{[n;ns]
  v:system"v ",string ns;
  full:$[ns~`.;v;` sv'ns,'v];
  n sublist desc v!{-22!get x}each full}

// free big intermediate results by name, then give memory back
release:{[nms]
  {x set 0#get x}each(),nms;
  .Q.gc[]}

\d .
