/ flat_file_backfill.q - load vendor files into missing history
/   q flat_file_backfill.q -db hdb -in /data/vendor -q
/ CSV files are called <table>_<yyyymmdd>.csv and have a header line.
/ instruments.txt is fixed width and replaces the reference table.

.bf.opt:.Q.def[`db`in!`hdb`incoming] .Q.opt .z.x;
.bf.db:hsym .bf.opt`db;
.bf.dir:hsym .bf.opt`in;
.bf.chunkBytes:50000000;
.bf.rows:0;
.bf.rejects:0;

.bf.names:`trade`quote!(`time`sym`price`size`side`venue;
  `time`sym`bid`ask`bsize`asize`venue);
.bf.types:`trade`quote!("PSFJCS";"PSFFJJS");

/ a row is usable if it belongs to the day and the keys are present
.bf.clean:{[dt;d]
  good:select from d where dt=`date$time,not null sym;
  .bf.rejects+:count[d]-count good;
  good
 }

/ called once per chunk with a list of complete lines; only the first
/ chunk of a file starts with the header
.bf.chunk:{[t;dt;dst;lines]
  if[first[lines] like "time,*";lines:1_lines];
  if[not count lines;:()];
  d:flip .bf.names[t]!(.bf.types t;",")0: lines;
  d:.bf.clean[dt;d];
  dst upsert .Q.en[.bf.db;d];
  .bf.rows+:count d;
 }

/ trade_20240105.csv -> (`trade;2024.01.05)
.bf.describe:{[f]
  p:"_" vs first "." vs string f;
  (`$first p;"D"$last p)
 }

.bf.skip:{[f;why] -2 "skipping ",string[f],": ",why;0b}

.bf.one:{[f]
  td:.bf.describe f;
  t:td 0;
  dt:td 1;
  if[(null dt) or not t in key .bf.names;:.bf.skip[f;"name not understood"]];
  p:.Q.par[.bf.db;dt;t];
  if[count key p;:.bf.skip[f;"partition already there"]];
  dst:` sv p,`;
  .bf.rows:.bf.rejects:0;
  .Q.fsn[.bf.chunk[t;dt;dst];` sv .bf.dir,f;.bf.chunkBytes];
  if[not .bf.rows;:.bf.skip[f;"no usable rows"]];
  `sym`time xasc dst;
  @[dst;`sym;`p#];
  -1 string[f],": ",string[.bf.rows]," rows, ",string[.bf.rejects]," rejected";
  1b
 }

/ columns:  1-8 sym  9-38 name  39-42 venue  43-50 lot  51-60 listed  61-62 filler
/ a blank in the type string skips the field
.bf.instruments:{[f]
  raw:("S*SJD ";8 30 4 8 10 2)0: f;
  r:flip `sym`descr`venue`lot`listed!raw;
  r:select sym,descr:trim each descr,venue,lot,listed from r where not null sym;
  (` sv .bf.db,`instrument) set `sym xkey r;
  count r
 }

/ the reverse direction, for checking what was stored
.bf.unload:{[f;t] f 0: csv 0: t}

.bf.main:{[]
  if[not count files:key .bf.dir;-2 "nothing in ",string .bf.dir;:0];
  if[`instruments.txt in files;.bf.instruments ` sv .bf.dir,`instruments.txt];
  todo:asc files where files like "*.csv";
  done:{[f] @[.bf.one;f;.bf.skip f]} each todo;
  / give the new dates an empty copy of every table that had no file
  if[any done;.Q.chk .bf.db];
  -1 string[sum done]," of ",string[count todo]," files loaded";
  count[todo]-sum done
 }

exit 1&.bf.main[]
