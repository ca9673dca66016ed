/ A walk through the iterators. Every line can be pasted on its own.

/ EACH -------------------------------------------------------------------
count each ("one";"three";"")           / 3 5 0
{x+y+z}'[1 2;3 4;5 6]                   / 9 12, lists are walked in step
1 2 3,'4 5 6                            / (1 4;2 5;3 6)
{x*y} .'(2 3;4 5)                       / 6 20, one argument list per call

/ EACH-LEFT, EACH-RIGHT --------------------------------------------------
1 2 3+/:10 20                           / (11 12 13;21 22 23)
1 2 3+\:10 20                           / (11 21;12 22;13 23)
(1+til 9)*/:\:1+til 9                   / multiplication table
("ab";"cd";"ae") like\:"a*"             / 101b

/ PRIOR ------------------------------------------------------------------
-':[0;5 7 12]                           / 5 2 5, the left argument seeds the first pair
deltas 5 7 12                           / the same thing with a name
{x>y} prior 3 5 4 6                     / is each item above the one before it?
1_(%':)100 110 99f                      / 1.1 0.9, first item is not a ratio

/ OVER AND SCAN: fold ----------------------------------------------------
(+/)1 2 3 4                             / 10
(+\)1 2 3 4                             / 1 3 6 10
100+/1 2 3                              / 106, with a starting value
{y+2*x}/[0;1 0 1 1]                     / 11, binary to integer by Horner
{x+y*z}/[0;1 2 3;4 5 6]                 / 32, fold over two lists at once
{y x}/[5;({x+1};{x*2};neg)]             / -12, thread a value through functions

/ nesting depth of brackets, character by character
depth:{{$[y="(";x+1;y=")";x-1;x]}\[0;x]}
depth "a(b(c)d)e"                       / 0 1 1 2 2 1 1 0 0

/ OVER AND SCAN: repeat --------------------------------------------------
/ with a unary function the left argument says how long to go on
{2*x}/[10;1]                            / do: 1024
{3*x}\[{x<100};1]                       / while: 1 3 9 27 81 243
({0.5*x+2%x}/)1f                        / converge: 1.414214
(raze/)(1;(2;(3;4 5)))                  / converge: 1 2 3 4 5

/ halve an integer until it stays where it is
({x div 2}\)37                          / 37 18 9 4 2 1 0

/ exponential smoothing with the previous state on the left
smooth:{[a;v] {[a;s;u] (a*u)+s*1-a}[a]\[first v;1_v]}
smooth[0.5;8 4 2f]                      / 6 4f

/ reachable nodes: keep adding neighbours until nothing new shows up
links:`a`b`c`d`e!(`b`c;`d`a;enlist`d;`symbol$();enlist`a)
reach:{[g;s] ({[g;v] asc distinct v,raze g v}[g]/)(),s}
reach[links;`a]                         / `a`b`c`d

/ iterators stack: left of a pair of iterators is the inner loop
cart:{raze x,/:\:y}
cart[`x`y;1 2]                          / ((`x;1);(`x;2);(`y;1);(`y;2))
