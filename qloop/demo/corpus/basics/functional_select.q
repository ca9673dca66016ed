/ functional forms of select, exec, update and delete
/ parse shows how a query looks inside; what follows builds such trees by hand

trade:([]time:09:30:00+00:00:10*til 6;sym:`abc`xyz`abc`abc`xyz`qqq;price:10 20 11 12 21 5f;size:100 200 100 300 100 50)

/ ?[table;constraints;by;columns]
all0:?[trade;();0b;()]                                   / select from trade
abc0:?[trade;enlist(=;`sym;enlist`abc);0b;()]            / select from trade where sym=`abc
vwap:?[trade;();(enlist`sym)!enlist`sym;(enlist`vwap)!enlist(wavg;`size;`price)]

/ exec of one column is a list, of several a dictionary
syms:?[trade;();();`sym]
both:?[trade;();();`price`size!`price`size]

/ a symbol constant is enlisted, so that it is not taken for a column
byname:{[t;c;v] ?[t;enlist(in;c;enlist(),v);0b;()]}

/ any number of columns, any number of filters given as a dictionary of column!values
filter:{[t;f] ?[t;{(in;x;enlist(),y)}'[key f;value f];0b;()]}

/ min, max and count of a column, by other columns
profile:{[t;c;g]
  g:(),g;
  ?[t;();g!g;`lo`hi`n!((min;c);(max;c);(count;`i))]
 }

/ the same aggregation over many columns: names get the aggregate's prefix
aggall:{[t;f;nm;cs;g]
  g:(),g;
  a:(`$string[nm],/:string cs)!f,/:cs;
  ?[t;();g!g;a]
 }

/ ![table;constraints;by;columns] updates; by 0b and a list of symbols deletes columns
bump:{[t;c;k] ![t;();0b;(enlist c)!enlist(*;k;c)]}
dropcols:{[t;cs] ![t;();0b;(),cs]}
droprows:{[t;c;v] ![t;enlist(in;c;enlist(),v);0b;`symbol$()]}

/ previous value within a group, under a new name
lagby:{[t;c;g] ![t;();(enlist g)!enlist g;(enlist`$"prev_",string c)!enlist(prev;c)]}

/ a time window is two constraints, most selective first
window:{[t;s;a;b] ?[t;((=;`sym;enlist s);(within;`time;(enlist;a;b)));0b;()]}

/ q)filter[trade;`sym`size!(`abc`xyz;100)]     / three rows
/ q)profile[trade;`price;`sym]                 / abc: 10 12 3
/ q)aggall[trade;max;`max;`price`size;`sym]    / maxprice maxsize by sym
/ q)eval parse"select max price by sym from trade"
