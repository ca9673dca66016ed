/ Data quality checks.
/ A rule is a dictionary with a kind, a column label and a test; the test maps a
/ table to one boolean per row, 1b where the row breaks the rule. A list of rules
/ is therefore itself a table, and can be shown, filtered and saved as one.

.dq.label:{$[-11h=type x;x;` sv x]}
.dq.rule:{[kind;c;test] `kind`col`test!(kind;.dq.label c;test)}

/ rule constructors -----------------------------------------------------------

.dq.notnull:{[c] .dq.rule[`notnull;c;{[c;t] null t c}[c]]}

/ nulls pass here, combine with notnull when they should not
.dq.range:{[c;lo;hi]
  .dq.rule[`range;c;{[c;b;t] not(null v)|(v:t c)within b}[c;(lo;hi)]]}

.dq.positive:{[c] .dq.rule[`positive;c;{[c;t] 0>=t c}[c]]}

/ c is one column or a list of columns that make up a key
.dq.uniq:{[c]
  .dq.rule[`uniq;c;{[c;t]
    k:$[-11h=type c;t c;flip t c];
    g:group k;
    (til count t)in raze value[g]where 1<count each value g}[c]]}

/ ref is a list, or a function of no arguments which is called at check time
.dq.oneof:{[c;ref]
  .dq.rule[`oneof;c;{[c;r;t] not(t c)in $[100h<=type r;r[];r]}[c;ref]]}

.dq.matches:{[c;pat]
  .dq.rule[`matches;c;{[c;p;t] not(string t c)like p}[c;pat]]}

/ f is any function from table to booleans that are true for good rows
.dq.custom:{[nm;c;f] .dq.rule[nm;c;{[f;t] not f t}[f]]}

/ time must not run backwards within a group
.dq.ordered:{[g;c]
  .dq.rule[`ordered;c;{[g;c;t]
    i:raze value group t g;
    v:t[c]i;
    b:(v<prev v)and not differ t[g]i;
    @[count[t]#0b;i;:;b]}[g;c]]}

/ running ---------------------------------------------------------------------

.dq.hits:{[rules;t] {[t;r] r[`test]t}[t]each rules}

/ one line per rule, with the first few offending row numbers
.dq.run:{[rules;t]
  t:0!t;
  w:where each .dq.hits[rules;t];
  n:count each w;
  ([]kind:rules`kind;col:rules`col;bad:n;pct:100*n%1|count t;rows:5 sublist/:w)}

.dq.split:{[rules;t]
  t:0!t;
  b:any .dq.hits[rules;t];
  `good`bad!(t where not b;t where b)}

.dq.enforce:{[rules;t]
  r:select from .dq.run[rules;t]where bad>0;
  if[count r;'"data checks failed: ",", "sv string distinct r`kind];
  t}

/ want is a dictionary of column to type char, as in the t column of meta
.dq.schema:{[want;t]
  have:exec c!t from meta t;
  miss:key[want]except key have;
  extra:key[have]except key want;
  both:key[want]inter key have;
  bad:both where not want[both]=have both;
  ([]issue:`missing;col:miss),([]issue:`extra;col:extra),([]issue:`badtype;col:bad)}

/ quick look at a new feed
.dq.nulls:{sum $[0h=type x;0=count each x;null x]}
.dq.profile:{[t]
  v:value flip t:0!t;
  ([]col:cols t;typ:exec t from meta t;nulls:.dq.nulls each v;dist:count each distinct each v)}

/ rules:(.dq.notnull`sym;.dq.range[`px;0.01;1e5];.dq.uniq`sym`time;.dq.oneof[`side;"BS"])
/ show .dq.run[rules;trade]
