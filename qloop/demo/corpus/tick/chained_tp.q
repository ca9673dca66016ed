/ chained_tp.q - second-tier tickerplant for desktop clients
/
/ Trades are forwarded as they come. Quotes and depth are conflated: only the
/ last row per key is kept and published on the timer, so that a slow client
/ costs us a bounded amount of memory. The same cache answers snapshots.
/   q chained_tp.q -p 5020 -up localhost:5010 -every 500

.ctp.opt:.Q.def[`up`every!(`$"localhost:5010";500)] .Q.opt .z.x;
.ctp.up:0Ni;
.ctp.tabs:0#`;

/ conflated tables and the columns that identify a row
.ctp.keys:`quote`depth!(enlist`sym;`sym`side`level);
.ctp.dirty:`quote`depth!(0#`;0#`);         / syms touched since the last tick

.ctp.subs:([]h:`int$();tbl:`symbol$();wild:`boolean$();syms:());

/ the last-value cache lives in its own namespace: .lvc.quote, .lvc.depth ...
.ctp.slot:{[t] ` sv `.lvc,t}

/ keying moves the key columns to the front; clients get the usual order
.ctp.cached:{[t] cols[t] xcols 0!get .ctp.slot t}

upd:{[t;x]
  if[not t in key .ctp.keys;:.ctp.pub[t;x]];
  n:.ctp.slot t;
  n upsert cols[n] xcols x;
  .ctp.dirty[t]:.ctp.dirty[t] union exec sym from x;
 }

/ the upstream end of day: publish what is left, pass it on, start empty
endofday:{[d]
  .ctp.tick[];
  {[d;w] @[neg w;(`endofday;d);{}]}[d] each exec distinct h from .ctp.subs;
  {[t] n set 0#get n:.ctp.slot t} each key .ctp.keys;
 }

/ ---- publishing

/ clients that take every symbol get one message that is serialized once
.ctp.pub:{[t;d]
  w:exec h from .ctp.subs where tbl=t,wild;
  if[count w;-25!(w;(`upd;t;d))];
  f:select h,syms from .ctp.subs where tbl=t,not wild;
  .ctp.pubSome[t;d]'[f`h;f`syms];
 }

.ctp.pubSome:{[t;d;w;s]
  r:select from d where sym in s;
  if[count r;neg[w](`upd;t;r)];
 }

.ctp.tickOne:{[t]
  s:.ctp.dirty t;
  if[not count s;:()];
  .ctp.dirty[t]:0#`;
  .ctp.pub[t;select from .ctp.cached[t] where sym in s];
 }

.ctp.tick:{[] .ctp.tickOne each key .ctp.keys;}

/ ---- subscribing: returns (table;snapshot); plain tables start empty

.ctp.sub:{[t;s]
  if[not t in .ctp.tabs;'"not available: ",string t];
  s:(),s;
  delete from `.ctp.subs where h=.z.w,tbl=t;
  `.ctp.subs upsert `h`tbl`wild`syms!(.z.w;t;all null s;s);
  if[not t in key .ctp.keys;:(t;0#get t)];
  r:.ctp.cached t;
  (t;$[all null s;r;select from r where sym in s])
 }

/ ---- upstream link

.ctp.link:{[]
  if[not null .ctp.up;:()];
  .ctp.up:@[hopen;(hsym .ctp.opt`up;1000);{0Ni}];
  if[null .ctp.up;:()];
  r:.ctp.up(`.tp.sub;`;`);
  .ctp.tabs:first each r;
  {[nt] nt[0] set nt 1} each r;
  {[t] .ctp.slot[t] set .ctp.keys[t] xkey get t} each key .ctp.keys;
 }

.z.pc:{[w]
  if[w=.ctp.up;.ctp.up:0Ni];
  delete from `.ctp.subs where h=w;
 }
.z.ts:{[now] .ctp.link[];.ctp.tick[]}
system"t ",string .ctp.opt`every;
