// Iterators, from the map kind to the accumulating kind.
// Each definition is followed by what it gives.

// each: apply to every item
lens:count each("q";"kdb";"")                 // 1 3 0
// each both: two lists in step
sums2:1 2 3+'10 20 30                         // 11 22 33, same as +
pairs:{x,y}'[1 2;3 4]                         // (1 3;2 4)
// each left and each right: one argument stays whole
grid:1 2 3*\:1 10 100                         // a row per left item
ext:"trade_",/:("abc";"xyz")                  // ("trade_abc";"trade_xyz")
cross2:raze 1 2,/:\:10 20                     // (1 10;1 20;2 10;2 20)
// each prior: neighbours
steps:-':[5 7 12 8]                           // 5 2 5 -4, the first item as it is
ups:1_(>':)3 5 4 6                            // 101b

// over keeps the last value, scan all of them
total:(+/)1 2 3 4                             // 10
running:(+\)1 2 3 4                           // 1 3 6 10
high:(|\)3 1 4 1 5                            // 3 3 4 4 5
fact:{prd 1+til x}
horner:{[cs;x] {[x;a;c] c+a*x}[x]/[0;cs]}     // horner[2 0 1;3] is 19

// with a start value
withstart:100+/1 2 3                          // 106
balance:{x+y}\[100;-30 20 -50]                // 70 90 40

// do: a number of times; while: as long as a test holds
dbl:5{2*x}/1                                  // 32
fib:10{x,sum -2#x}/0 1                        // first twelve
halve:{x>1}{x div 2}\100                      // 100 50 25 12 6 3 1

// converge: until nothing changes
sqrt2:{0.5*x+2%x}/[1f]                        // 1.414214
collapse:{ssr[x;"  ";" "]}/["a    b   c"]     // "a b c"

// running state of two values: count and mean
online:{[s;x] n:1+s 0; (n;s[1]+(x-s 1)%n)}
means:last each online\[(0;0f);4 8 6f]        // 4 6 6

// exponential average written as a scan; the first value starts it
ewma:{[a;xs] {[a;p;x] (a*x)+p*1-a}[a]\[first xs;1_xs]}

// what can be reached in one or two steps; converged on, the transitive closure
reach:{[m] f:`float$m; m|0<f mmu f}
closure:reach/

// peach is each over secondary processes; the function must not set globals
sq:{x*x} peach til 8
