/ ---------------------------------------------------------------------------
/ string_utils.q : searching, splitting, padding, parsing and light templating
/ ---------------------------------------------------------------------------

\d .str

/ --- predicates ---
starts:{[s;p] p~count[p] sublist s}
ends:{[s;p] p~neg[count p] sublist s}
has:{[s;p] 0<count s ss (),p}             / ss wants a string, never a lone char
digits:{(0<count x)&all x in .Q.n}
blank:{0=count trim x}

/ --- padding and trimming ---
lpad:{[n;s] neg[n]$s}               / "  ab"
rpad:{[n;s] n$s}                    / "ab  "
zpad:{[n;v] neg[n]#(n#"0"),string v}
/ collapse runs of blanks: keep a blank only when the item before it is not one
squeeze:{x where not b&prev b:x=" "}

/ --- case ---
cap:{$[count x;@[lower x;0;upper];x]}
title:{" " sv cap each " " vs x}
snake:{"_" sv lower each (distinct 0,where x in .Q.A) _ x}

/ --- splitting and joining ---
fields:{[d;s] trim each d vs s}
unlines:{"\n" sv x}
/ "a=1;b=2" -> `a`b!(,"1";,"2")
kv:{(!)."S=;"0:x}
/ text between the first pair of markers
between:{[s;l;r]
  i:first s ss (),l;
  if[null i;:""];
  t:(i+count l)_s;
  j:first t ss (),r;
  $[null j;"";j#t]
 }

/ --- conversion: a bad parse gives a null, never an error ---
toint:{"J"$x}
tosym:{`$trim x}
/ the first type in the list that can read every item
guess:{[v]
  ok:{[v;c] not any null c$v}[v] each "JFDT";
  $[any ok;(first "JFDT" where ok)$v;`$v]
 }

/ --- substitution ---
/ "{name}" placeholders are filled from a dictionary of symbols, numbers or dates
fmt:{[tpl;d] ssr/[tpl;"{",/:string[key d],\:"}";string value d]}

/ --- ciphers and games ---
caesar:{[n;s]
  m:(.Q.A!n rotate .Q.A),.Q.a!n rotate .Q.a;
  s^m s
 }
palin:{s~reverse s:lower x where x in .Q.a,.Q.A}
vowels:{sum lower[x] in "aeiou"}

\d .

.str.starts["banana";"ban"]             / 1b
.str.ends["banana";"nan"]               / 0b
"banana" ss "an"                        / 1 3
.str.zpad[5;42]                         / "00042"
.str.squeeze "a   b  c"                 / "a b c"
.str.title "the QUICK fox"              / "The Quick Fox"
.str.snake "orderBookDepth"             / "order_book_depth"
.str.fields[",";"x , y,z "]             / (,"x";,"y";,"z")
.str.kv "a=1;b=two"                     / `a`b!(,"1";"two")
.str.between["id <42> end";"<";">"]     / "42"
.str.guess ("1";"2";"30")               / 1 2 30
.str.guess ("1";"2.5")                  / 1 2.5
.str.guess ("red";"blue")               / `red`blue
.str.fmt["{qty} of {sym}";`qty`sym!(10;`ABC)]   / "10 of ABC"
.str.caesar[1;"Hal, 9!"]                / "Ibm, 9!"
.str.palin "Never odd or even"          / 1b
