/ list_surgery.q -- cutting lists up and sewing them back together

/ take: wraps round when it runs out, sublist does not
5#1 2                           / 1 2 1 2 1
5 sublist 1 2                   / 1 2
-3#til 10                       / 7 8 9
2 3 sublist til 10              / 2 3 4     (start, length)
2 3#til 6                       / reshape: (0 1 2;3 4 5)

/ drop and cut
2_til 5                         / 2 3 4
-2_til 5                        / 0 1 2
0 3 5 _ "abcdefgh"              / ("abc";"de";"fgh")
3 cut til 8                     / (0 1 2;3 4 5;6 7)
"abcde" _ 2                     / "abde"    (one item removed by position)

/ moving items about
insertat:{[l;i;v] (i#l),v,i _ l}
removeat:{[l;i] l (til count l) except i}
swap:{[l;i;j] @[l;i,j;:;l j,i]}
interleave:{raze x,'y}
insertat[1 2 5;2;3 4]           / 1 2 3 4 5
removeat["abcdef";1 3]          / "acef"
swap["stop";0;3]                / "ptos"
interleave["ace";"bdf"]         / "abcdef"
1 rotate 1 2 3                  / 2 3 1

/ sliding windows, and neighbours as pairs
windows:{[n;v] v (til 1+count[v]-n)+\:til n}
pairs:{flip (-1_x;1_x)}
windows[3;10 20 30 40]          / (10 20 30;20 30 40)

/ split by predicate; split at every delimiter
partition:{[f;v] m:f v; (v where m;v where not m)}
splitat:{[d;v] {$[x~first y;1_y;y]}[d] each (distinct 0,where v=d) cut v}
partition[{0=x mod 2};til 7]    / (0 2 4 6;1 3 5)
splitat[0;1 2 0 3 0 4 5]        / (1 2;enlist 3;4 5)

/ runs of equal items
runs:{(where differ x) cut x}
runs 1 1 2 3 3 3                / (1 1;enlist 2;3 3 3)

/ matrices
m:3 3#1+til 9
flip m                          / transpose
diag:{x@'til count x}
diag m                          / 1 5 9
upper3:(til 3)<=\:til 3         / mask of the upper triangle
m*upper3
sum each m                      / row sums:    6 15 24
sum m                           / column sums: 12 15 18
rot90:{reverse each flip x}
spiral:{$[2>count x;raze x;(first x),.z.s reverse flip 1_x]}
spiral m                        / 1 2 3 6 9 8 7 4 5

/ ragged lists made square with nulls on the right
square:{n:max count each x; n#'x,\:n#0N}
square (1 2;enlist 3;4 5 6)     / (1 2 0N;3 0N 0N;4 5 6)

/ as sets
1 2 3 4 inter 2 4 6             / 2 4
1 2 3 except 2                  / 1 3
1 2 union 2 3                   / 1 2 3
`a`b cross 0 1                  / ((`a;0);(`a;1);(`b;0);(`b;1))

/ tables with nested columns
basket:([] cust:`ann`bob; items:(`milk`tea;`tea`rice`salt))
long:ungroup basket             / five rows
back:0!select items by cust from long
back~basket                     / 1b
`items xgroup long              / customers per item
