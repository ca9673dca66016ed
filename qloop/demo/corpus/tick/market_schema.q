/ ---------------------------------------------------------------------
/  market_schema.q
/  Table shapes for the equity capture stack. Every process loads this
/  file first, so it must stay free of side effects: no ports, no disk.
/ ---------------------------------------------------------------------

/ time is always stamped by the tickerplant, never by the feed
trade:([]time:`timestamp$();sym:`symbol$();price:`float$();
  size:`long$();side:`char$();venue:`symbol$())

quote:([]time:`timestamp$();sym:`symbol$();bid:`float$();ask:`float$();
  bsize:`long$();asize:`long$();venue:`symbol$())

/ one row per changed level; size 0 removes the level
depth:([]time:`timestamp$();sym:`symbol$();side:`char$();level:`short$();
  price:`float$();size:`long$())

/ slow-moving reference data, loaded from file each morning
instrument:([sym:`symbol$()]descr:();venue:`symbol$();lot:`long$();listed:`date$())

/ only these are captured and written down
.schema.names:`trade`quote`depth

/ step dictionary: the minimum price increment grows with the price
.schema.tick:`s#0 1 5 10 50 100f!0.0001 0.0005 0.001 0.005 0.01 0.05

/ round a price (or list of prices) to its tick
.schema.roundPx:{[px] step*floor 0.5+px%step:.schema.tick px}

/ column name -> type character; a blank means a nested or untyped column
.schema.types:{[x] exec c!t from meta x}

/ signal if data cannot be inserted into the named table, else return data
.schema.check:{[tbl;data]
  if[not tbl in .schema.names;'"unknown table ",string tbl];
  want:.schema.types tbl;
  have:.schema.types data;
  if[count miss:key[want] except key have;
    '"missing columns: ",", " sv string miss];
  bad:where not (want=" ") or want=key[want]#have;
  if[count bad;'"wrong type in: ",", " sv string bad];
  data
 }

/ put columns in canonical order, add nulls for absent ones, drop extras
.schema.conform:{[tbl;data]
  shape:0#value tbl;
  cols[shape]#shape uj data
 }

/ accept either one record (list of atoms) or a list of columns
.schema.toTable:{[tbl;x]
  c:cols tbl;
  $[98h=type x;x;0>type first x;enlist c!x;flip c!x]
 }

/ empty the captured tables and put the grouped attribute on sym
.schema.reset:{[]
  {[t] t set @[0#value t;`sym;`g#]} each .schema.names;
 }

/ typed null for a column, handy when widening old partitions
.schema.nullOf:{[tbl;c] first 0#value[tbl] c}

/ best bid and offer from depth: latest size per level, then the inside prices
.schema.inside:{[d]
  lv:0!select last price,last size by sym,side,level from d;
  lv:select from lv where size>0;
  b:select bid:max price by sym from lv where side="B";
  a:select ask:min price by sym from lv where side="S";
  b uj a
 }
