/ trade_tables.q
/ plain tables, keyed tables and the four qSQL templates on a toy trade table

/ column literals may run over several lines as long as they are indented
trade:([] date:6#2024.03.04;
  time:09:30:00.000 09:30:02.500 09:31:10.000 09:31:40.250 09:33:05.000 09:34:59.999;
  sym:`AAA`BBB`AAA`CCC`BBB`AAA;
  side:`B`S`S`B`B`S;
  px:101.5 20.25 101.75 7.5 20.5 101.25;
  qty:100 400 50 1000 200 300)

/ a keyed table is a dictionary from a table of keys to a table of values
refdata:([sym:`AAA`BBB`CCC] lot:100 100 500; sector:`tech`energy`retail; active:110b)

keys refdata                            / expected: ,`sym
refdata[`BBB;`sector]                   / expected: `energy
refdata`AAA                             / a row comes back as a dictionary
refdata([] sym:`CCC`AAA)                / many rows: index with a table of keys

/ ---- select -----------------------------------------------------------
/ grouping keys the result
bysym:select n:count i, vol:sum qty, vwap:qty wavg px by sym from trade
bysym[`AAA;`vol]                        / expected: 450

ohlc:select open:first px, high:max px, low:min px, close:last px by sym from trade

/ constraints cascade: each one only sees the rows the previous one let through,
/ so the fby average below is the average of the larger trades only
rich:select from trade where sym in `AAA`BBB, qty>=100, px>(avg;px) fby sym
count rich                              / expected: 2

/ last row of every symbol, keeping all columns
latest:select from trade where i=(last;i) fby sym

/ two-minute buckets
bars:select vol:sum qty by sym, bucket:2 xbar time.minute from trade

/ ---- exec -------------------------------------------------------------
exec distinct sym from trade            / a list
exec sum qty by sym from trade          / a dictionary: AAA 450, BBB 600, CCC 1000
exec px, qty from trade where sym=`BBB  / a dictionary of columns

/ ---- update -----------------------------------------------------------
/ with by, aggregates are spread back over the rows of the group
shares:update share:qty%sum qty by sym from trade
signed:update pos:sums qty*?[side=`B;1;-1] by sym from trade

/ a backtick on the table name makes the change stick
update active:1b from `refdata where sym=`CCC;

/ ---- delete -----------------------------------------------------------
noside:delete side from trade
bulk:delete from trade where qty<100
count bulk                              / expected: 5

/ ---- adding rows ------------------------------------------------------
`trade insert (2024.03.04;09:35:00.000;`CCC;`S;7.45;500);
`refdata upsert (`DDD;200;`tech;1b);    / new key: appended
`refdata upsert (`AAA;10;`tech;1b);     / known key: overwritten
count refdata                           / expected: 4

/ left join picks up the reference columns by key
bysector:select notional:sum px*qty by sector from trade lj refdata
