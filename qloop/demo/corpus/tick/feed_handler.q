/ feed_handler.q
/ Turns pipe-delimited venue lines into tickerplant updates. With -sim it
/ invents the lines itself, so the whole stack can run without a venue.
/   q feed_handler.q -tp localhost:5010 -sim

\d .fh

addr:hsym .Q.def[(enlist`tp)!enlist`$"localhost:5010"][.Q.opt .z.x]`tp
tph:0Ni
buf:()             / messages not yet handed to the tickerplant
cap:5000           / keep at most this many while it is away
wait:1             / seconds until the next connection attempt
retryAt:.z.p
seen:"TQ"!0 0      / highest sequence number per message kind
fmt:"TQ"!("SFJCSJ";"SFFJJSJ")
tbl:"TQ"!`trade`quote

/ T|ABC|101.25|300|B|XA|7    kind, sym, price, size, side, venue, sequence
/ Q|ABC|101.2|101.3|5|9|XA|8 kind, sym, bid, ask, sizes, venue, sequence
take:{[k;lines]
  c:(fmt k;"|")0: 2_'lines;
  s:last c;
  if[(1+seen k)<first s;
    -2 "gap in ",k,": expected ",string[1+seen k]," got ",string first s];
  fresh:where s>seen k;
  .fh.seen[k]:max s,seen k;
  emit[tbl k;(-1_c)@\:fresh];
 }

onLines:{[lines]
  g:group first each lines;
  {[lines;g;k] take[k;lines g k]}[lines;g] each "TQ" inter key g;
 }

emit:{[t;c]
  if[not count first c;:()];
  buf::buf,enlist(`.tp.upd;t;c);
  drain[];
 }

/ hand everything over; if the handle breaks, put it back and reconnect
drain:{[]
  if[null tph;buf::neg[cap] sublist buf;:()];
  pending:buf;
  buf::();
  @[push;pending;{[p;e] buf::p,buf;tph::0Ni;-2 "publish failed: ",e;}[pending]];
 }

push:{[msgs]
  {[m] neg[tph] m} each msgs;
  neg[tph][];
 }

reconnect:{[]
  if[(not null tph) or .z.p<retryAt;:()];
  tph::@[hopen;(addr;500);{0Ni}];
  wait::$[null tph;60&2*wait;1];
  retryAt::.z.p+wait*0D00:00:01;
  if[not null tph;drain[]];
 }

\d .sim

on:`sim in key .Q.opt .z.x
syms:`AAX`BQD`CLM`DRT`EPV
venues:`XA`XB
px:syms!20+count[syms]?80f
seq:"TQ"!0 0

/ n consecutive sequence numbers as strings
stamp:{[k;n] r:1+seq[k]+til n;.sim.seq[k]+:n;string r}
cents:{[x] 0.01*floor 0.5+100*x}
walk:{[s] .sim.px[s]*:1+0.0004*-1+count[s]?2f;}
join:{[fields] "|" sv/:flip fields}

trades:{[n]
  s:n?syms;
  walk s;
  join (n#enlist enlist "T";string s;string cents px s;string 100*1+n?20;
    enlist each n?"BS";string n?venues;stamp["T";n])
 }

quotes:{[n]
  m:px s:n?syms;
  half:0.01*1+n?3;
  join (n#enlist enlist "Q";string s;string cents m-half;string cents m+half;
    string 100*1+n?9;string 100*1+n?9;string n?venues;stamp["Q";n])
 }

\d .

.z.pc:{[w] if[w=.fh.tph;.fh.tph:0Ni;.fh.retryAt:.z.p]}

/ a real venue pushes lines to us: neg[h](`.fh.onLines;lines)
.z.ts:{[now]
  .fh.reconnect[];
  if[.sim.on;.fh.onLines .sim.trades[1+rand 20],.sim.quotes 1+rand 60];
 }

system"t 250";
