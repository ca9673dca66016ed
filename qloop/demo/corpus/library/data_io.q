// data_io.q - tables in and out of json and csv, with the types put right
\d .dio

// ---------------------------------------------------------------- json

// json null arrives as 0n, which must not turn into a symbol with that text
tosym:{[v] $[0h<=type v;.z.s each v;null v;`;`$string v]}

// After .j.k every number is a float and every date is a string. cast takes a
// lower case type char and an atom, a vector or a mixed list and repairs it.
// "*" means leave alone.
cast:{[c;v]
  $[c="*";v;
    0h=type v;.z.s[c]each v;
    10h=abs type v;upper[c]$v,();
    c="s";tosym v;
    c$v]}

// epoch milliseconds, as most javascript clients send them, to timestamp
fromepoch:{[ms] 1970.01.01D00:00:00+1000000*"j"$ms}
toepoch:{[ts] ("j"$ts-1970.01.01D00:00:00)div 1000000}

// a list of objects with different keys does not collapse to a table by itself
astable:{[x]
  $[98h=type x;x;
    99h=type x;enlist x;
    (uj/)enlist each x]}

// schema is a dictionary such as `sym`time`px`qty!"spfj"
applyschema:{[schema;t]
  missing:key[schema]except cols t;
  if[count missing;'"missing columns: "," "sv string missing];
  flip key[schema]!cast'[value schema;t key schema]}

fromjson:{[schema;txt] applyschema[schema;astable .j.k txt]}

// infinities are not json, write them as null
noinf:{[t]
  c:exec c from meta t where t="f";
  {[t;c] @[t;c;{?[x in 0w -0w;0n;x]}]}/[t;c]}

tojson:{[t] .j.j noinf 0!t}

// one object per line, the form log shippers like
savelines:{[path;t] path 0:.j.j each noinf 0!t}
loadlines:{[schema;path] fromjson[schema;"[",(","sv read0 path),"]"]}

// ---------------------------------------------------------------- csv

digits:{[n] raze n#enlist"[0-9]"}
daypat:digits[4],"?",digits[2],"?",digits 2
pats:"DPT"!(daypat;daypat,"[DT ]",digits[2],":*";digits[2],":",digits[2],"*")

isnum:{[c;s] not any null c$s}

// guess the type char of a column of strings; empty cells do not vote
infer:{[s]
  s:s where 0<count each s;
  if[0=count s;:"*"];
  if[all lower[s]in("true";"false");:"B"];
  if[isnum["J";s];:"J"];
  hit:where all each s like/:value pats;
  if[count hit;:key[pats]first hit];
  if[isnum["F";s];:"F"];
  $[0.5>count[distinct s]%count s;"S";"*"]}

conv:{[c;s]
  $[c="*";s;c="B";lower[s]~\:"true";c$s]}

// everything as text first, header names made safe by .Q.id
rawcsv:{[path]
  n:count","vs first read0 path;
  .Q.id(n#"*";enlist",")0:path}

csvtypes:{[path] t:rawcsv path;cols[t]!infer each value flip t}

// hints overrides the guess for single columns, e.g. (enlist`id)!enlist"S"
loadcsv:{[path;hints]
  t:rawcsv path;
  ty:(cols[t]!infer each value flip t),hints;
  flip cols[t]!conv'[ty cols t;value flip t]}

savecsv:{[path;t] path 0:csv 0:0!t}

\d .
