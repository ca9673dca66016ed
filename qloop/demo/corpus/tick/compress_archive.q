/ compress_archive.q : compress partitions older than a number of days
/   q compress_archive.q -db /data/hdb -age 30 -s 4
/ Recent dates stay uncompressed because they are read most. Run it at night;
/ readers that have a file mapped keep the old one until they reload.

/ New files written by this process are compressed as well: blocks of 2^17
/ bytes, gzip, level 6. A path with an extension would be left alone.
.z.zd:17 2 6

.cz.opt:.Q.def[`db`age`minKb`dry!(`hdb;30;64;0b)] .Q.opt .z.x
.cz.db:hsym .cz.opt`db

/ gzip for most; the sorted columns are read all the time and get snappy,
/ which is worse at packing but cheap to unpack
.cz.codec:{[c] $[c in `time`sym;17 3 0;17 2 6]}

/ -- finding files

.cz.roots:{[db] $[`par.txt in key db;hsym each `$read0 ` sv db,`par.txt;enlist db]}

.cz.dates:{[root]
  d:"D"$string k:key root;
  k where (not null d) and d<.z.d-.cz.opt`age
 }

/ column files of one splayed table; .d is tiny and has to stay as it is
.cz.columns:{[dir] ` sv/:dir,/:(key dir) except `.d}

.cz.files:{[root]
  parts:` sv/:root,/:.cz.dates root;
  splays:raze {[p] ` sv/:p,/:key p} each parts;
  raze .cz.columns each splays
 }

/ -21! gives an empty dictionary for a file that is not compressed
.cz.isDone:{[f] 0<count -21!f}

.cz.wanted:{[f]
  if[(hcount f)<1024*.cz.opt`minKb;:0b];
  not .cz.isDone f
 }

/ -- one file

/ Work on a copy and move it over the original only if it has the right
/ length: hcount gives the uncompressed length in both cases. The move is
/ atomic because source and target are in the same directory.
.cz.squeeze:{[f]
  before:hcount f;
  tmp:`$string[f],".cz";
  col:last ` vs f;
  -19!(f;tmp),.cz.codec col;
  if[not before=hcount tmp;hdel tmp;'"length differs after compression"];
  after:(-21!tmp)`compressedLength;
  system"mv ",(1_string tmp)," ",1_string f;
  (before;after)
 }

/ a failure leaves the original untouched; 0N marks it in the report
.cz.safely:{[f] @[.cz.squeeze;f;{[f;e] -2 string[f],": ",e;0N 0N}[f]]}

/ -- report

.cz.report:{[fs;r]
  t:([]file:fs;before:r[;0];after:r[;1]);
  t:update col:{[f] last ` vs f} each file from t;
  s:select files:count i,failed:sum null before,mbBefore:1e-6*sum before,
    mbAfter:1e-6*sum after by col from t;
  `mbBefore xdesc update ratio:mbBefore%mbAfter from s
 }

/ compression of everything that is already packed, for comparison
.cz.existing:{[root]
  f:.cz.files root;
  f:f where .cz.isDone each f;
  if[not count f;:()];
  s:{[f] d:-21!f;d`uncompressedLength`compressedLength} each f;
  sum[s[;0]]%sum s[;1]
 }

.cz.main:{[]
  fs:raze .cz.files each .cz.roots .cz.db;
  if[not count fs;:0];
  fs:fs where .cz.wanted each fs;
  -1 string[count fs]," files to compress";
  if[(not count fs) or .cz.opt`dry;:0];
  r:.cz.safely peach fs;
  show .cz.report[fs;r];
  sum null r[;0]
 }

exit 1&.cz.main[]
