/ tests for matrix_graph.q
/ shared fixtures live in .fx so that each test stays short

\l test_kit.q
\l matrix_graph.q

\d .fx
tol:1e-9
a:(4 7f;2 6f)
b:(2 0 0f;0 3 4f;0 4 9f)
/ a diamond with a tail: a -> b,c -> d -> e
g:.gr.adj[`a`a`b`c`d;`b`c`d`d`e]
loop:.gr.adj[`x`y`z;`y`z`x]
\d .

.tk.describe`matrix

.tk.it[`identity_is_neutral;{[]
  .tk.eq[.mat.ident 2;(1 0f;0 1f)];
  .tk.eq[.mat.mul[.fx.a;.mat.ident 2];.fx.a];
  .tk.eq[.mat.mul[.mat.ident 2;.fx.a];.fx.a];
  .tk.eq[.mat.shape .fx.b;3 3];
  }]

.tk.it[`integers_are_accepted;{[]
  .tk.eq[.mat.mul[(1 2;3 4);(0 1;1 0)];(2 1f;4 3f)];
  .tk.eq[.mat.tr(1 2;3 4);5];
  .tk.eq[.mat.outer[1 2;3 4 5];(3 4 5;6 8 10)];
  }]

.tk.it[`determinants;{[]
  .tk.near[.mat.det .fx.a;10f;.fx.tol];
  .tk.near[.mat.det .fx.b;22f;.fx.tol];
  / product rule
  p:.mat.mul[.fx.a;.fx.a];
  .tk.near[.mat.det p;100f;1e-6];
  }]

.tk.it[`inverse_and_solve;{[]
  .tk.near[.mat.mul[.fx.a;.mat.inverse .fx.a];.mat.ident 2;.fx.tol];
  .tk.near[.mat.solve[.fx.a;18 14f];1 2f;.fx.tol];
  .tk.raises[.mat.inverse;enlist(1 2f;2 4f);"singular"];
  .tk.raises[.mat.inverse;enlist(1 2 3f;4 5 6f);"not square"];
  }]

.tk.it[`powers;{[]
  fib:(1 1f;1 0f);
  .tk.eq[.mat.mpow[fib;10];(89 55f;55 34f)];
  .tk.eq[.mat.mpow[fib;1];fib];
  .tk.eq[.mat.mpow[fib;0];.mat.ident 2];
  }]

.tk.it[`power_iteration;{[]
  r:.mat.power[.fx.b;60];
  .tk.near[r`val;11f;1e-6];
  .tk.near[.mat.norm r`vec;1f;.fx.tol];
  / it really is an eigenvector
  .tk.near[.fx.b mmu r`vec;r[`val]*r`vec;1e-6];
  }]

.tk.it[`least_squares;{[]
  x:0 1 2 3 4f;
  .tk.near[.mat.ols[3+2*x;enlist x];3 2f;1e-6];
  }]

.tk.describe`graph

.tk.it[`distances;{[]
  .tk.eq[.gr.bfs[.fx.g;`a];`a`b`c`d`e!0 1 1 2 3];
  .tk.eq[.gr.bfs[.fx.g;`e];(enlist`e)!enlist 0];
  .tk.eq[count .gr.edges .fx.g;5];
  }]

.tk.it[`paths;{[]
  .tk.eq[.gr.path[.fx.g;`a;`e];`a`b`d`e];
  .tk.eq[.gr.path[.fx.g;`a;`a];enlist`a];
  .tk.eq[.gr.path[.fx.g;`e;`a];`symbol$()];
  .tk.eq[.gr.path[.gr.flipped .fx.g;`e;`c];`e`d`c];
  }]

.tk.it[`closure_and_cycles;{[]
  .tk.eq[.gr.closure(010b;001b;000b);(011b;001b;000b)];
  .tk.yes .gr.hascycle .fx.loop;
  .tk.yes not .gr.hascycle .fx.g;
  }]

.tk.it[`dependency_layers;{[]
  needs:`app`db`log!(`db`log;enlist`log;`symbol$());
  .tk.eq[.gr.layers needs;enlist each`log`db`app];
  .tk.raises[.gr.layers;enlist .fx.loop;"cycle"];
  }]

.tk.it[`all_pairs;{[]
  w:(0 4 1f;4 0 2f;1 2 0f);
  .tk.eq[.gr.apsp w;(0 3 1f;3 0 2f;1 2 0f)];
  / no way back
  .tk.eq[.gr.apsp(0 5f;0w 0f);(0 5f;0w 0f)];
  }]

if[`run in key .Q.opt .z.x;.tk.finish[]]
