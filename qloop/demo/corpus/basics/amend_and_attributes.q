/ changing parts of things in place, and telling q what it may rely on

/ ---- indexed assignment and its function forms
v:10 20 30 40
v[1]:21
v[0 3]+:5                        / 15 21 30 45
v:@[v;where v>25;:;0]            / 15 21 0 0
w:@[til 5;1 3;neg]               / 0 -1 2 -3 4
m:.[3 3#til 9;(1;2);:;100]       / one cell
m:.[m;(::;0);+;1000]             / a column

/ by name: the global changes and its name is returned
cnt:`a`b!0 0
@[`cnt;`a;+;1]
`cnt upsert(enlist`c)!enlist 7

/ nested dictionaries are reached with a path
cfg:`db`log!(`host`port!(`localhost;5010);`level`file!(`info;`))
cfg:.[cfg;`db`port;:;5011]
cfg[`log;`level]

/ ---- histogram by amend: one pass, no sort
hist:{[n;xs] @[n#0;xs;+;1]}
/ hist[4;0 1 1 3] is 1 2 0 1

/ ---- attributes
/ sorted: binary search; a list that is not sorted refuses it
s:`s#1 3 5 7
/ unique: hash for keys
u:`u#`aa`bb`cc
/ parted: equal items stand together, for columns on disk
p:`p#`aa`aa`bb`bb`bb
/ grouped: an index of positions, kept up on append
g:`g#`aa`bb`aa

attrs:{[t] (cols t)!attr each value flip 0!t}
noattr:{[t] @[t;cols t;`#]}
/ try to set it; leave the column alone when the data does not allow it
tryattr:{[a;x] .[#;(a;x);{[x;e] x}[x]]}

/ a step function: a sorted dictionary answers with the value at or before
rate:`s#2024.01.01 2024.03.01 2024.06.01!0.05 0.0475 0.045
rate 2024.04.15                  / 0.0475

/ appending keeps `g, and keeps `s only if the new items are in order
t:([]time:`s#09:30 09:31;sym:`g#`aa`bb)
`t insert(09:32;`aa)
attrs t

/ ---- multi-column sort with the attribute that a splayed table wants
sortfordisk:{[t] update`p#sym from`sym`time xasc t}
