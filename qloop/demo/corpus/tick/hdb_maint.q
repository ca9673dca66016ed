/ hdb_maint.q
/ Structural changes to a partitioned database, one directory at a time.
/ Stop the readers or reload them afterwards. Every operation can be run
/ twice: a directory that is already in the wanted state returns 0b.

/ all directories that hold table t, through par.txt when there is one
.mt.paths:{[db;t]
  roots:$[`par.txt in key db;hsym each `$read0 ` sv db,`par.txt;enlist db];
  parts:raze {[r] ` sv/:r,/:k where not null "D"$string k:key r} each roots;
  if[not count parts;:()];
  p:` sv/:parts,\:t;
  p where 0<count each key each p
 }

/ the enumeration domain must be in memory before symbols can be sorted
.mt.attach:{[db] `sym set get ` sv db,`sym;}

/ apply f to each directory; an error is reported and does not stop the rest
.mt.run:{[f;db;t]
  .mt.attach db;
  p:.mt.paths[db;t];
  r:{[f;p] @[f;p;{[p;e] -2 "  ",string[p],": ",e;0b}[p]]}[f] each p;
  ([]path:p;changed:r)
 }

/ --- add a column holding one default value
.mt.addOne:{[db;c;v;p]
  f:` sv p,`.d;
  have:get f;
  if[c in have;:0b];
  n:count get ` sv p,first have;
  x:.Q.en[db;([]val:n#v)]`val;
  (` sv p,c) set x;
  f set have,c;
  1b
 }

/ --- rename; nested columns keep their data in companion files c# and c##
.mt.move:{[p;old;new;suffix]
  src:` sv p,`$string[old],suffix;
  dst:` sv p,`$string[new],suffix;
  if[not ()~key src;system"mv ",(1_string src)," ",1_string dst];
 }

.mt.renameOne:{[old;new;p]
  f:` sv p,`.d;
  have:get f;
  if[(new in have) or not old in have;:0b];
  .mt.move[p;old;new] each ("";enlist "#";"##");
  f set @[have;where have=old;:;new];
  1b
 }

/ --- drop: take it out of .d first, so that a crash leaves only a stray file
.mt.dropOne:{[c;p]
  f:` sv p,`.d;
  have:get f;
  if[not c in have;:0b];
  f set have except c;
  hdel ` sv p,c;
  1b
 }

/ --- change the type of a simple column, keeping its attribute
.mt.castOne:{[c;ty;p]
  f:` sv p,c;
  a:attr x:get f;
  if[ty=.Q.ty x;:0b];
  f set a#ty$x;
  1b
 }

/ --- sort by sym then time on disk, then mark sym as parted
.mt.resortOne:{[p]
  d:` sv p,`;
  if[`p=attr get ` sv p,`sym;:0b];
  `sym`time xasc d;
  @[d;`sym;`p#];
  1b
 }

.mt.addColumn:{[db;t;c;v] .mt.run[.mt.addOne[db;c;v];db;t]}
.mt.renameColumn:{[db;t;old;new] .mt.run[.mt.renameOne[old;new];db;t]}
.mt.dropColumn:{[db;t;c] .mt.run[.mt.dropOne c;db;t]}
.mt.castColumn:{[db;t;c;ty] .mt.run[.mt.castOne[c;ty];db;t]}
.mt.resort:{[db;t] .mt.run[.mt.resortOne;db;t]}

/ --- audit: directories whose columns differ in length or in order
.mt.lengths:{[p] c!count each get each ` sv/:p,/:c:get ` sv p,`.d}

.mt.ragged:{[db;t]
  .mt.attach db;
  p:.mt.paths[db;t];
  p where 1<{[x] count distinct value .mt.lengths x} each p
 }

.mt.layouts:{[db;t] count each group {[p] get ` sv p,`.d} each .mt.paths[db;t]}

/ q).mt.addColumn[`:/data/hdb;`trade;`cond;`]
/ q).mt.renameColumn[`:/data/hdb;`quote;`bsize;`bidSize]
