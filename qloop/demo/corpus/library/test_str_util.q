/ q test_str_util.q -run

\l test_kit.q
\l str_util.q

.tk.describe`str_util

.tk.it[`padding;{[]
  .tk.eq[.str.padr[5;"ab"];"ab   "];
  .tk.eq[.str.padl[5;"ab"];"   ab"];
  .tk.eq[.str.centre[6;"ab"];"  ab  "];
  .tk.eq[.str.zfill[4;42];"0042"];
  / a number that is too long is left alone
  .tk.eq[.str.zfill[2;12345];"12345"];
  }]

.tk.it[`prefix_and_suffix;{[]
  .tk.yes .str.starts["tradeprice";"trade"];
  .tk.yes .str.ends["tradeprice";"price"];
  .tk.yes not .str.starts["tr";"trade"];
  .tk.yes .str.has["a needle in hay";"needle"];
  .tk.eq[.str.times["banana";"an"];2];
  }]

.tk.it[`identifiers;{[]
  good:("px";"bid_size";"a1");
  bad:("";"1a";"a-b");
  .tk.yes .str.isident each good;
  .tk.yes not .str.isident each bad;
  .tk.yes .str.isdigits"0123";
  .tk.yes not .str.isdigits"";
  }]

.tk.it[`cleaning;{[]
  .tk.eq[.str.squeeze"  a   b  c ";"a b c"];
  .tk.eq[.str.words"  to be  or ";("to";"be";"or")];
  .tk.eq[.str.stripchars["1,234.5";","];"1234.5"];
  .tk.eq[.str.unquote"\"abc\"";"abc"];
  .tk.eq[.str.unquote"abc";"abc"];
  }]

.tk.it[`case_styles;{[]
  pairs:(("tradeDate";"trade_date");("orderId";"order_id");("px";"px"));
  {[p]
    .tk.eq[.str.snake p 0;p 1];
    .tk.eq[.str.camel p 1;p 0];
    }each pairs;
  .tk.eq[.str.title"the long day";"The Long Day"];
  }]

.tk.it[`column_names;{[]
  t:([]tradeDate:1 2;bidSize:3 4);
  .tk.eq[cols .str.snakecols t;`trade_date`bid_size];
  .tk.eq[.str.camelcols .str.snakecols t;t];
  }]

.tk.it[`template;{[]
  d:`sym`px!(`abc;1.5);
  .tk.eq[.str.fill["{sym} at {px}";d];"abc at 1.5"];
  .tk.eq[.str.fill["no marks";d];"no marks"];
  }]

.tk.it[`wrap_lines;{[]
  ls:.str.wrap[11;"the quick brown fox"];
  .tk.eq[ls;("the quick";"brown fox")];
  .tk.yes 11>=count each ls;
  .tk.eq[.str.indent[2;"a b\nc d"];"  a b\n  c d"];
  }]

.tk.it[`csv_round_trip;{[]
  row:("plain";"with, comma";"say \"hi\"";"");
  .tk.eq[.str.csvquote"a,b";"\"a,b\""];
  .tk.eq[.str.csvquote"plain";"plain"];
  .tk.eq[.str.csvsplit .str.csvline row;row];
  }]

.tk.it[`hex_and_base64;{[]
  .tk.eq[.str.hex"AB";"4142"];
  .tk.eq[.str.unhex"4142";"AB"];
  .tk.eq[.str.enc"Man";"TWFu"];
  .tk.eq[.str.enc"Ma";"TWE="];
  .tk.eq[.str.enc enlist"M";"TQ=="];
  / every length mod 3, with bytes above 127
  s:"c"$5 250 17 128 255 64 0;
  {.tk.eq[.str.dec .str.enc x;x]}each(1+til 7)#\:s;
  }]

if[`run in key .Q.opt .z.x;.tk.finish[]]
