/ fs_loader.q
/ file system helpers (.fs) and a load-once module loader built on them (.mod)
/ every path is a file symbol such as `:data/in

/ key gives a list for a directory, the symbol itself for a file, () for nothing
.fs.exists:{[p] not()~key p}
.fs.isdir:{[p] 11h=type key p}
.fs.isfile:{[p] p~key p}

.fs.join:{[d;f] ` sv d,f}
.fs.ls:{[d]
  if[not .fs.isdir d;'"not a directory: ",1_string d];
  d .fs.join/:key d}

/ all files below p, depth first
.fs.walk:{[p] $[.fs.isdir p;raze .z.s each .fs.ls p;enlist p]}

.fs.base:{[p] last"/"vs 1_string p}
.fs.ext:{[p]
  i:where"."=n:.fs.base p;
  $[count i;(1+last i)_n;""]}
.fs.withext:{[p;e] f where e~/:.fs.ext each f:.fs.walk p}

.fs.du:{[p] sum hcount each .fs.walk p}
.fs.slurp:{[p] "c"$read1 p}
.fs.spit:{[p;txt] p 1:"x"$txt}
.fs.copy:{[src;dst] dst 1:read1 src}
.fs.append:{[p;ls] h:hopen p;neg[h] ls;hclose h;}

/ first and last lines of a log; only one block of it is read
.fs.head:{[p;n] n sublist read0(p;0;65536&hcount p)}
.fs.tail:{[p;n] s:hcount p;neg[n]sublist read0(p;s-k;k:65536&s)}

/ hdel only removes empty directories, so children go first
.fs.rmtree:{[p]
  if[not .fs.exists p;:0];
  n:$[.fs.isdir p;sum 0,.z.s each .fs.ls p;0];
  hdel p;
  n+1}

.fs.tmpname:{[prefix]
  hsym`$"/tmp/",prefix,"_",string[.z.i],"_",string rand 1000000}

/ write to a scratch name, then rename, so that readers never see half a file
.fs.replace:{[p;ls]
  t:`$string[p],".part";
  t 0:ls;
  system"mv ",(1_string t)," ",1_string p;
  p}

/ ---- modules ----

.mod.path:enlist`:.
.mod.stack:`symbol$()
.mod.loaded:([name:`symbol$()] file:`symbol$();at:`timestamp$();ms:`long$();chk:`symbol$())

.mod.addpath:{[d] .mod.path:distinct .mod.path,hsym d;}
.mod.digest:{[f] `$raze string md5 .fs.slurp f}

.mod.find:{[nm]
  c:.mod.path .fs.join\:`$string[nm],".q";
  c:c where .fs.isfile each c;
  $[count c;first c;'"module not found: ",string nm]}

/ returns 1b when the file was read, 0b when it was there already
.mod.need:{[nm]
  if[nm in exec name from .mod.loaded;:0b];
  if[nm in .mod.stack;'"circular load: ","->"sv string .mod.stack,nm];
  f:.mod.find nm;
  .mod.stack,:nm;
  t0:.z.p;
  err:@[{system"l ",x;""};1_string f;{x}];
  .mod.stack:-1_.mod.stack;
  if[count err;'"loading ",string[nm],": ",err];
  ms:(`long$.z.p-t0)div 1000000;
  `.mod.loaded upsert(nm;f;t0;ms;.mod.digest f);
  1b}

.mod.forget:{[nm] delete from`.mod.loaded where name=nm;}

/ read again what changed on disk since it was loaded
.mod.refresh:{[]
  t:0!.mod.loaded;
  nm:t[`name]where not t[`chk]~'.mod.digest each t`file;
  .mod.forget each nm;
  .mod.need each nm;
  nm}
