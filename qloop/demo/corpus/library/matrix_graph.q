// Dense matrices (.mat) and small directed graphs (.gr).
// A matrix is a list of float rows. A graph is a dictionary from a node to the
// list of nodes it points at.

\d .mat

ident:{[n] `float$i=/:i:til n}
shape:{[m] (count m;count first m)}
mul:{[a;b] (`float$a)mmu`float$b}
tran:{[m] flip m}
diag:{[m] m@'til count m}
tr:{[m] sum diag m}
outer:{[u;v] u*\:v}
dot:{[u;v] sum u*v}
norm:{[v] sqrt sum v*v}
issym:{[m] m~flip m}

// determinant along the first row; exponential, meant for small matrices
minor:{[m;j] (1_m)_\:j}
det:{[m]
  $[1=n:count m;
    m[0;0];
    sum m[0]*(n#1 -1)*.z.s each minor[m]each til n]}

// inv returns nulls or noise for a singular matrix, so ask first
inverse:{[m]
  if[not count[m]=count first m;'"not square"];
  if[1e-12>abs det m;'"singular"];
  inv`float$m}

// solve m x = b
solve:{[m;b] inverse[m]mmu`float$b}

// integer powers by squaring
mpow:{[m;n]
  $[n=0;ident count m;
    1=n mod 2;m mmu .z.s[m;n-1];
    h mmu h:.z.s[m;n div 2]]}

// dominant eigenvalue and vector after k rounds of power iteration
power:{[m;k]
  step:{[m;v] w%norm w:m mmu v};
  v:step[m]/[k;count[m]#1f];
  `val`vec!(dot[v;m mmu v];v)}

// least squares with an intercept: coefficients, the constant first
ols:{[y;xs]
  x:enlist[count[y]#1f],xs;
  first enlist[`float$y]lsq`float$x}

\d .gr

adj:{[src;dst]
  n:distinct src,dst;
  (n!count[n]#enlist`symbol$()),dst@/:group src}

edges:{[g] raze key[g],/:'value g}
flipped:{[g] e:edges g;adj[e[;1];e[;0]]}

// distance in hops from s to every node that can be reached
bfs:{[g;s]
  step:{[g;d]
    nxt:(distinct raze g where d=max d)except key d;
    $[count nxt;d,nxt!count[nxt]#1+max d;d]};
  step[g]/[(enlist s)!enlist 0]}

// node -> the node it was first reached from; the start maps to the null symbol
parents:{[g;s]
  step:{[g;p]
    e:raze{[g;a] a,/:g a}[g]each key p;
    if[0=count e;:p];
    e:e where not e[;1]in key p;
    if[0=count e;:p];
    i:first each group e[;1];
    p,key[i]!e[value i;0]};
  step[g]/[(enlist s)!enlist`]}

// follow the parents back until nothing changes any more
path:{[g;s;t]
  p:parents[g;s];
  if[not t in key p;:`symbol$()];
  reverse -1_{[p;n] p n}[p]\[t]}

// boolean adjacency matrix in node order
tomatrix:{[g] key[g]in/:value g}

// transitive closure: square the relation until it stops growing
closure:{[b] 0<{`float$(0<x)|0<x mmu x}/[`float$b]}
hascycle:{[g] any .mat.diag closure tomatrix g}

// layers for loading in dependency order: nodes with no open needs come first
layers:{[needs]
  if[hascycle needs;'"cycle"];
  r:();
  while[count needs;
    free:where 0=count each needs;
    r,:enlist free;
    needs:(free _ needs)except\:free];
  r}

// all pairs shortest paths (Floyd and Warshall); 0w where there is no edge
apsp:{[w] {[d;k] d&d[;k]+/:\:d k}/[w;til count w]}

\d .
