/ contexts: keeping names out of each other's way

/ a context is created by switching to it or by assigning to a dotted name
\d .bank

bal:(`symbol$())!`float$()
log0:([] seq:`long$(); acct:`symbol$(); amt:`float$())
seq:0

/ names inside a function are resolved in the context where it was defined,
/ so bal below is .bank.bal wherever the caller happens to be
exists:{[a] a in key bal}

open:{[a]
  if[exists a;'"account exists: ",string a];
  bal[a]:0f;
  a
 }

/ symbols, on the other hand, are resolved when they are used:
/ a table changed by name needs its full name
post:{[a;amt]
  if[not exists a;'"no account: ",string a];
  if[0>bal[a]+amt;'"insufficient funds"];
  seq+:1;
  `.bank.log0 insert (seq;a;`float$amt);
  bal[a]+:amt;
  bal a
 }

/ both legs are checked before anything is booked
transfer:{[src;dst;amt]
  if[not all exists each src,dst;'"unknown account"];
  if[amt>bal src;'"insufficient funds"];
  post[src;neg amt];
  post[dst;amt];
  bal src,dst
 }

/ double colon assigns a whole global from inside a function
reset:{bal::0#bal; log0::0#log0; seq::0}

\d .

.bank.open each `ann`bob;
.bank.post[`ann;100]                    / expected: 100f
.bank.transfer[`ann;`bob;30]            / expected: 70 30f
count .bank.log0                        / expected: 3
exec sum amt by acct from .bank.log0    / expected: `ann`bob!70 30f

/ ---------------------------------------------------------------------------
/ a context is also a dictionary, so the usual tools apply

/ names defined in it; the first key of a context is an empty placeholder
names:{[ns] (key ns) except `}
full:{[ns] ` sv/: ns,/:names ns}
names `.bank
full `.bank                             / `.bank.bal`.bank.log0 ...

/ split the contents into functions and data
funcs:{[ns] n where 100h=type each get each n:full ns}
data:{[ns] (full ns) except funcs ns}
funcs `.bank                            / exists, open, post, transfer, reset
data `.bank                             / bal, log0, seq

/ read and write by computed name
getin:{[ns;n] get ` sv ns,n}
setin:{[ns;n;v] (` sv ns,n) set v}
setin[`.tmp;`answer;42];
getin[`.tmp;`answer]                    / expected: 42
.tmp.answer                             / the same
`.tmp`answer . ::

/ delete one name
delete answer from `.tmp;
names `.tmp                             / expected: `symbol$()

/ run code in another context and always come back
within0:{[ns;code]
  old:system "d";
  system "d ",string ns;
  r:@[{(1b;value x)};code;{(0b;x)}];
  system "d ",string old;
  $[first r;last r;'last r]
 }
within0[`.bank;"key bal"]               / expected: `ann`bob
