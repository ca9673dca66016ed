/ Functional forms of qSQL: ?[t;c;b;a] selects or execs, ![t;c;b;a] updates or deletes.
/ c is a list of constraints, b a grouping dictionary (0b for none, () for exec),
/ a is a dictionary of result name -> parse tree.  Column names are symbols, so a
/ symbol CONSTANT has to be enlisted or it would be looked up as a column.

\d .fq

lit:{$[11h=abs type x;enlist x;x]}

/ constraint builders
eq:{[c;v] (=;c;lit v)}
isin:{[c;v] (in;c;lit v)}
rng:{[c;lo;hi] (within;c;(lo;hi))}
gt:{[c;v] (>;c;lit v)}
neq:{[c;v] (not;eq[c;v])}

/ `sym -> (enlist`sym)!enlist`sym
same:{c:(),x; c!c}

/ every function against every column: names are built as fn_col
aggs:{[fd;cs]
  pr:key[fd] cross (),cs;
  nm:`$"_" sv/: string pr;
  nm!flip (fd pr[;0];pr[;1])
 }

/ b may be empty, one symbol or a list of symbols
sel:{[t;c;b;a] ?[t;c;$[count b;same b;0b];a]}

/ one column as a plain vector
col:{[t;c;name] ?[t;c;();name]}

/ keep only the named columns
pick:{[t;cs] ?[t;();0b;same cs]}

/ add one computed column
addcol:{[t;name;tree] ![t;();0b;(enlist name)!enlist tree]}

dropcols:{[t;cs] ![t;();0b;(),cs]}
droprows:{[t;c] ![t;c;0b;`symbol$()]}

/ apply a unary function to each of several columns
mapcols:{[t;cs;f] cs:(),cs; ![t;();0b;cs!f,/:cs]}

/ add a constraint to an already parsed select; the constraint list sits at
/ index 2 of the tree, one enlist deeper than in the functional call
andwhere:{[tree;w] @[tree;2;{enlist (first x),enlist y}[;w]]}

\d .

quote:([] sym:`x`y`x`z`y`x;
  venue:`A`A`B`B`A`B;
  bid:10 20 10.2 30 20.1 9.9;
  ask:10.1 20.3 10.4 30.5 20.2 10;
  size:5 10 15 20 25 30)

w:(.fq.isin[`sym;`x`y];.fq.gt[`size;5])
.fq.sel[quote;w;`sym;.fq.aggs[`lo`hi!(min;max);`bid`ask]]
/ columns: sym| lo_bid lo_ask hi_bid hi_ask

.fq.col[quote;enlist .fq.eq[`venue;`A];`size]
/ expected: 5 10 25

.fq.addcol[quote;`mid;(%;(+;`bid;`ask);2)]
.fq.mapcols[quote;`bid`ask;neg]
cols .fq.dropcols[quote;`size]                  / expected: `sym`venue`bid`ask
count .fq.droprows[quote;enlist .fq.eq[`sym;`x]] / expected: 3

/ exec ... by: grouping by a bare symbol returns a dictionary
?[quote;();`sym;(sum;`size)]                    / expected: `x`y`z!50 35 20

/ start from text, finish with data
pt:parse "select mx:max ask by sym from quote where size>5"
eval .fq.andwhere[pt;.fq.eq[`venue;`B]]
