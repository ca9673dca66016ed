\d .str
/ String helpers. Arguments called s are char lists; (),s lets a single char pass.

/ --- padding
padr:{[n;s] n$s}
padl:{[n;s] neg[n]$s}
centre:{[n;s] n$((0|(n-count s)div 2)#" "),s}
zfill:{[n;x] ((0|n-count s)#"0"),s:string x}
rule:{[n] n#"-"}

/ --- tests and counts
starts:{[s;p] p~count[p]sublist s}
ends:{[s;p] p~neg[count p]sublist s}
has:{[s;p] 0<count s ss p}
times:{[s;p] count s ss p}
isdigits:{[s] (0<count s)and all s in .Q.n}
isident:{[s]
  if[0=count s:(),s;:0b];
  (first[s]in .Q.a,.Q.A)and all s in .Q.a,.Q.A,.Q.n,"_"}

/ --- cleaning
tostr:{[x] $[10h=type x;x;0h>type x;string x;.Q.s1 x]}
squeeze:{[s] ssr[;"  ";" "]/[trim s]}
stripchars:{[s;cs] s except cs}
words:{[s] w where 0<count each w:" "vs s}
unquote:{[s] $[(1<count s)and all"\""=(first s;last s);-1_1_s;s]}

/ --- case
cap:{[s] $[count s;@[s;0;upper];s]}
title:{[s] " "sv cap each" "vs s}

/ camelCase to snake_case; a run of capitals counts as one word
snake:{[s]
  u:s in .Q.A;
  i:where u and not prev u;
  lower"_"sv(distinct 0,i)cut s}

camel:{[s]
  w:"_"vs s;
  raze enlist[first w],cap each 1_w}

/ rename the columns of a table either way
snakecols:{[t] (`$snake each string cols t)xcol t}
camelcols:{[t] (`$camel each string cols t)xcol t}

/ --- templating: fill["{sym} at {px}";`sym`px!(`abc;1.5)]
fill:{[tmpl;d]
  marks:"{",/:string[key d],\:"}";
  ssr/[tmpl;marks;tostr each value d]}

/ greedy wrap at w characters, gives a list of lines
wrap:{[w;s]
  ws:words s;
  add:{[w;ls;x]
    $[w>=1+count[last ls]+count x;
      (-1_ls),enlist last[ls]," ",x;
      ls,enlist x]};
  add[w]/[1#ws;1_ws]}

indent:{[n;s] "\n"sv(n#" "),/:"\n"vs s}

/ --- csv
csvquote:{[s] $[any s in",\"\r\n";"\"",ssr[s;"\"";"\"\""],"\"";s]}
csvline:{[xs] ","sv csvquote each tostr each xs}

/ split one csv line; commas between quotes are not separators
csvsplit:{[s]
  out:not(sums s="\"")mod 2;
  f:(0,1+where out and s=",")cut s,",";
  {ssr[unquote x;"\"\"";"\""]}each -1_'f}

/ --- hex and base64
hex:{[s] raze string"x"$(),s}
unhex:{[s] "c"$"X"$2 cut s}

b64:.Q.A,.Q.a,.Q.n,"+/"

/ three bytes become one number in base 256, then four digits in base 64
enc:{[s]
  if[0=count s:(),s;:""];
  n:neg[count s]mod 3;
  b:("j"$"x"$s),n#0;
  i:raze(4#64)vs/:256 sv/:3 cut b;
  (neg[n]_b64 i),n#"="}

dec:{[s]
  if[0=count s;:""];
  n:"j"$sum s="=";
  i:(b64?s except"="),n#0;
  b:raze(3#256)vs/:64 sv/:4 cut i;
  "c"$neg[n]_b}

\d .
