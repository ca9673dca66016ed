/ error_trap.q
/ signalling and catching errors

\d .err

/ @ traps a call with one argument, . traps a call with a list of arguments.
/ The handler gets the message as a string; anything that is not a function is
/ simply returned as the fallback value.
try:{[f;a;dflt] @[f;a;{[d;e] d}[dflt]]}
tryn:{[f;args;dflt] .[f;args;{[d;e] d}[dflt]]}

/ tagged result: (1b;value) or (0b;message)
attempt:{[f;a] @[{[f;a] (1b;f a)}[f];a;{[e] (0b;e)}]}

/ map over a list and keep the failures apart
safemap:{[f;xs]
  r:attempt[f] each xs;
  ok:first each r;
  `good`bad!((last each r) where ok;xs[where not ok]!(last each r) where not ok)
 }

/ run up to n times, pass the last error on when patience runs out
retry:{[n;f;a]
  r:attempt[f;a];
  $[first r;last r;n>1;.z.s[n-1;f;a];'last r]
 }

/ always run the cleanup, then either return or signal again
finally:{[f;a;cleanup]
  r:attempt[f;a];
  cleanup[];
  if[not first r;'last r];
  last r
 }

/ add some context to whatever went wrong further down
context:{[what;f;a] @[f;a;{[w;e] 'w,": ",e}[what]]}

assert:{[cond;msg] if[not cond;'msg]; cond}

/ true when the call fails with a message matching the pattern
fails:{[f;a;pat] r:attempt[f;a]; $[first r;0b;last[r] like pat]}

\d .

/ a handler is optional in spirit: a constant does the job
@[{1+x};`oops;`failed]                          / `failed
.[{x%y};(6;3);0n]                               / 2f
.[+;(1 2 3;4 5);{"caught: ",x}]                 / "caught: length"
@[value;`nosuchname;{`$x}]                      / `nosuchname

parsenum:{[s] $[null r:"F"$s;'"not a number: ",s;r]}
.err.try[parsenum;"2.5";0n]                     / 2.5
.err.attempt[parsenum;"ten"]                    / (0b;"not a number: ten")
.err.safemap[parsenum;("1.5";"two";"3.5")]`good / 1.5 3.5
.err.fails[parsenum;"abc";"not a number*"]      / 1b

/ a flaky function that works at the third call
calls:0
flaky:{calls::calls+1; if[calls<3;'`flaky]; x*calls}
.err.retry[5;flaky;10]                          / 30

/ row validation: one predicate per column, all problems reported together
checks:`sym`qty`px!({not null x};{x>0};{(x>0)&x<1e6})
validate:{[row]
  bad:(key checks) where not (value checks)@'row key checks;
  if[count bad;'"bad ",", " sv string bad];
  row
 }
.err.attempt[validate;`sym`qty`px!(`ABC;-5;0f)] / (0b;"bad qty, px")

/ keep the backtrace when it matters
traced:{[f;a]
  .Q.trp[f;a;{[e;bt] (`failed;e;.Q.sbt bt)}]
 }
first traced[{x+`a};1]                          / `failed
