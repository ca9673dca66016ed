// test_kit.q: the small test runner of this library, and stubs for tests
//
// A test is a function of no arguments; it passes when it does not signal.
//   .tk.describe`strings
//   .tk.it[`pad;{[] .tk.eq[3$"a";"a  "]}]
//   .tk.finish[]          runs all and leaves with 0 or 1

\d .tk

cur:`default
tests:([]suite:`symbol$();name:`symbol$();fn:())
results:([]suite:`symbol$();name:`symbol$();status:`symbol$();msg:();ms:`float$())

describe:{[s] .tk.cur:s;}
it:{[nm;f] `.tk.tests upsert`suite`name`fn!(.tk.cur;nm;f);}

// ---- assertions

fail:{[msg] '"assert: ",msg}
yes:{[c] if[not all c;fail"condition is false"];}
eq:{[act;ex]
  if[not act~ex;fail"expected ",(.Q.s1 ex)," but got ",.Q.s1 act];}
ne:{[act;ex] if[act~ex;fail"both are ",.Q.s1 ex];}

// numbers, vectors or matrices within tol of each other; nulls never are
near:{[act;ex;tol]
  d:raze abs act-ex;
  if[any(null d)|d>tol;fail"not near ",(.Q.s1 ex),": ",.Q.s1 act];}

// f called with the argument list args must signal a text like pat
raises:{[f;args;pat]
  r:.[{(1b;x . y)};(f;args);{(0b;x)}];
  if[first r;fail"nothing was signalled"];
  if[not last[r]like pat;fail"wrong signal: ",last r];}

// ---- running

run1:{[t]
  t0:.z.p;
  e:@[{x@(::);""};t`fn;{x}];
  ms:1e-6*`long$.z.p-t0;
  st:$[""~e;`pass;`fail];
  `.tk.results upsert`suite`name`status`msg`ms!(t`suite;t`name;st;e;ms);}

report:{[]
  show select n:count i,passed:sum status=`pass,ms:sum ms by suite from results;
  bad:select from results where status=`fail;
  {-2"FAIL ",string[x`suite],"/",string[x`name],": ",x`msg}each bad;
  count bad}

runall:{[]
  .tk.results:0#results;
  run1 each tests;
  report[]}

// a shell only sees the exit code, so cap it at one
finish:{[] exit 1&runall[]}

// Stubs. stub puts another value behind a global name and remembers the first
// one; spy also records the arguments of each call; reset puts all back.

\d .mock

saved:(enlist`)!enlist(::)
calls:([]fn:`symbol$();args:())

keep:{[nm]
  if[not nm in key saved;.mock.saved[nm]:@[get;nm;{[e]`.mock.absent}]];}

stub:{[nm;v] keep nm;nm set v;}

record:{[nm;f;a]
  `.mock.calls upsert`fn`args!(nm;a);
  f . a}

spy:{[nm;f] stub[nm;('[record[nm;f];enlist])];}

callsto:{[nm] exec args from calls where fn=nm}

drop:{[nm]
  p:` vs nm;
  ![` sv -1_p;();0b;enlist last p];}

restore:{[nm]
  v:saved nm;
  $[v~`.mock.absent;drop nm;nm set v];
  .mock.saved:enlist[nm]_saved;}

reset:{[]
  restore each key[saved]except`;
  .mock.calls:0#calls;}

\d .
