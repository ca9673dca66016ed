/ set_diff.q
/ sets as lists without repeats (.set), and the difference of two versions of a
/ keyed table as a patch which can be applied, reverted and printed (.tdiff)

\d .set

of:{[x] asc distinct x}
symdiff:{[a;b] (a except b),b except a}
subset:{[a;b] all a in b}
same:{[a;b] subset[a;b]and subset[b;a]}
disjoint:{[a;b] not any a in b}
jaccard:{[a;b] count[a inter b]%1|count a union b}
cart:{[a;b] a cross b}

/ all subsets; bit patterns of 0 .. 2^n-1 pick the members
power:{[x] n:count x;x@/:where each(n#2)vs/:til`long$2 xexp n}
combos:{[k;x] s where k=count each s:power x}

/ split by a boolean function: (those that pass;the rest)
partition:{[f;x] b:f each x;(x where b;x where not b)}

/ items that occur more than once, and how often
repeats:{[x] d:count each group x;(where 1<d)#d}

/ merge sets that share a member until they are pairwise disjoint
merge:{[ss]
  step:{[acc;s]
    hit:0<count each acc inter\:s;
    (acc where not hit),enlist distinct s,raze acc where hit};
  step/[();ss]}

\d .tdiff

/ A patch is a dictionary of four tables with the columns of the originals:
/   added    rows whose key is only in the new version
/   removed  rows whose key is only in the old version
/   was, now rows with a key in both but different values, in the same order

diff:{[old;new;k]
  k:(),k;
  if[not asc[cols old]~asc cols new;'"columns differ"];
  o:0!old;
  n:cols[o]#0!new;
  ok:k#o;
  nk:k#n;
  if[count[ok]>count distinct ok;'"old key is not unique"];
  if[count[nk]>count distinct nk;'"new key is not unique"];
  both:nk where nk in ok;
  a:o ok?both;
  b:n nk?both;
  ch:where not a~'b;
  `added`removed`was`now!(n where not nk in ok;o where not ok in nk;a ch;b ch)}

size:{[d] count each`added`removed`now#d}
isempty:{[d] 0=sum size d}
equal:{[a;b;k] isempty diff[a;b;k]}

/ swap the roles, so that patch[new;k;invert d] gives the old version
invert:{[d] `added`removed`was`now!d`removed`added`now`was}

/ the result is not keyed and is sorted by the key
patch:{[t;k;d]
  k:(),k;
  u:(k xkey 0!t)upsert d[`added],d`now;
  u:0!u;
  k xasc u where not(k#u)in k#d`removed}

/ as patch, but refuse when a row has moved on since the patch was made
safepatch:{[t;k;d]
  u:0!t;
  if[not all(d[`was],d`removed)in cols[d`was]#u;'"patch does not apply"];
  patch[t;k;d]}

/ one line per changed cell, values as text since their types differ
cells:{[k;d]
  k:(),k;
  f:{[k;d;c]
    j:where not d[`was;c]~'d[`now;c];
    old:.Q.s1 each d[`was;c]j;
    new:.Q.s1 each d[`now;c]j;
    flip flip[(k#d`now)j],`fld`old`new!(count[j]#c;old;new)};
  raze f[k;d]each cols[d`now]except k}

\d .
