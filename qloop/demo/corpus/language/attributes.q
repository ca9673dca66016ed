/ Attributes are promises about a list that let the interpreter search faster.
/   `s# sorted    binary search
/   `u# unique    hash table
/   `p# parted    equal items are adjacent, one range per distinct item
/   `g# grouped   an index from each distinct item to its positions
/ A promise that is false is refused at the door; a promise that stops being true
/ after an append is quietly dropped.

sorted:`s#1 3 5 9
attr sorted                             / expected: `s
sorted,:11                              / still ascending ...
attr sorted                             / expected: `s
sorted,:2                               / ... and now it is not
attr sorted                             / expected: `

/ asking for the impossible signals an error
@[`s#;3 1 2;{[e] e}]                    / expected: "s-fail"
@[`u#;`a`b`a;{[e] e}]                   / expected: "u-fail"

/ take the attribute off again
attr `#`s#1 2 3                         / expected: `

/ operations that give an attribute as a by-product
attr asc 3 1 2                          / expected: `s
attr til 5                              / expected: ` (nothing is implied by til)
attr key select count i by s from ([] s:`b`a`b)   / a keyed result is marked too

/ ---------------------------------------------------------------- tables
n:10000
t:([] time:asc n?0D08; sym:n?`aa`bb`cc`dd; px:n?100f)

/ in memory: group on the column used for look-ups
update `g#sym from `t;
attr t`sym                              / expected: `g

/ the same thing with amend, by name or by value
@[`t;`time;`s#];
byname:@[t;`sym;`#]
attr byname`sym                         / expected: `

/ on disk layout: sort by symbol then time, and mark the symbol as parted
parted:update `p#sym from `sym`time xasc t
exec c!a from meta parted               / only sym carries an attribute

/ set several attributes at once from a dictionary column -> attribute
setattrs:{[t;d] {[t;c;a] @[t;c;a#]}/[t;key d;value d]}
/ and report what is there
attrs:{[t] c!attr each (0!t) c:cols t}
/ try one, leave the table alone if the data does not allow it
tryattr:{[t;c;a] .[{[t;c;a] @[t;c;a#]};(t;c;a);{[t;e] t}[t]]}

bare:setattrs[t;`time`sym!2#`]
attrs bare                              / expected: `time`sym`px!```
attrs setattrs[bare;`time`sym!`s`g]     / expected: `time`sym`px!`s`g`
attrs tryattr[bare;`sym;`u]             / expected: `time`sym`px!```

/ ---------------------------------------------------------------- step functions
/ `s# on a dictionary answers with the value at the last key not above the argument
band:`s#0 100 1000!`small`medium`large
band 99 100 5000                        / expected: `small`medium`large

/ unique keys make a dictionary look-up a hash probe
ids:`u#`$"id",/:string til 1000
lookup:ids!til 1000
lookup`id42                             / expected: 42

/ timing: same search with and without the hash
\ts:1000 ids?`id999
plain:`#ids
\ts:1000 plain?`id999
