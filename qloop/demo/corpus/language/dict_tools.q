// dictionaries: settings, merging, inverting, nesting

// ---- joining --------------------------------------------------------------
// d1,d2 is an upsert: on common keys the right side wins
defaults:`mode`port`depth`verbose!(`batch;5010;10;0b)
override:`port`verbose!(6001;1b)
cfg:defaults,override
cfg`port`depth                      // expected: 6001 10

// ^ also merges, but a null on the right does not hide a value on the left;
// arithmetic works on the union of the keys
base:`a`b`c!10 20 30
patch:`b`c`d!5 0N 7
base,patch                          // expected: `a`b`c`d!10 5 0N 7
base^patch                          // expected: `a`b`c`d!10 5 30 7
base+0^patch                        // expected: `a`b`c`d!10 25 30 7

// total any number of count dictionaries
addall:{(+/) x}
tally:{count each group x}
addall tally each ("banana";"bandana")
// expected: "band"!2 6 4 1, keys in order of first sight

// ---- looking things up ----------------------------------------------------
base?20                             // reverse lookup, expected: `b
where base>15                       // keys whose value passes, expected: `b`c
(where base>15)#base                // the sub-dictionary
(enlist`b) _ base                   // drop by key
getor:{[d;k;dflt] $[k in key d;d k;dflt]}
getor[cfg;`timeout;30]              // expected: 30

// ---- turning inside out ---------------------------------------------------
colour:`apple`cherry`lime`kiwi!`red`red`green`green
group colour                        // expected: `red`green!(`apple`cherry;`lime`kiwi)
invert:{(value x)!key x}            // only for one-to-one mappings

// rename some keys and leave the others alone
rekey:{[m;d] k:key d; (k^m k)!value d}
rekey[`a`b!`alpha`beta;base]        // expected: `alpha`beta`c!10 20 30

bykey:{k!x k:asc key x}
byval:{desc x}                      // desc on a dictionary sorts on the values

// ---- nesting --------------------------------------------------------------
tree:`session`risk!(`open`close!09:30 16:00;`limit`warn!100 80)
tree . `risk`warn                   // expected: 80
tree:.[tree;`risk`warn;:;85]        // deep amend
tree[`session;`close]               // expected: 16:00

// flatten one level into dotted names: `risk.limit and so on
flat:{[d]
  pre:{[p;s] ` sv/: p,/:key s};
  raze pre'[key d;value d]!'value each value d
 }

// ---- between dictionaries and tables --------------------------------------
totable:{([] k:key x; v:value x)}
fromtable:{(x`k)!x`v}
base~fromtable totable base         // expected: 1b

// a list of dictionaries with equal keys IS a table
people:(`name`age!(`ann;31);`name`age!(`bob;45))
type people                         // expected: 98h
avg people`age                      // expected: 38f
