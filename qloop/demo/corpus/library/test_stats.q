// Unit tests of stats.q. Expected values were worked out by hand on tiny
// samples; the random helpers are checked with a fixed seed and wide bands.
system each"l ",/:("test_kit.q";"stats.q");

EPS:1e-9
.tk.describe`stats

.tk.it[`quantile_odd_sample;{[]
  x:5 1 4 2 3f;
  .tk.near[.stat.quantile[x;0.5];3f;EPS];
  .tk.near[.stat.quantile[x;0.25];2f;EPS];
  .tk.near[.stat.quantile[x]each 0 1f;1 5f;EPS];
  }]

.tk.it[`quantile_between_points;{[]
  .tk.near[.stat.quantile[1 2 3 4f;0.5];2.5;EPS];
  .tk.near[.stat.quantile[enlist 7f;0.3];7f;EPS];
  }]

.tk.it[`weighted_quantile;{[]
  x:10 20 30 40f;
  .tk.eq[.stat.wquantile[1 1 1 1;x;0.5];20f];
  // all the weight on one value
  .tk.eq[.stat.wquantile[0 0 5 0;x;0.5];30f];
  // order of the input does not matter
  .tk.eq[.stat.wquantile[1 2 3;3 2 1f;0.5];.stat.wquantile[3 2 1;1 2 3f;0.5]];
  }]

.tk.it[`moments;{[]
  .tk.near[.stat.skew 1 2 3 4 5f;0f;EPS];
  .tk.yes 0<.stat.skew 1 1 1 1 10f;
  .tk.yes 0>.stat.skew 1 10 10 10 10f;
  // two points of equal weight have the lowest kurtosis there is
  .tk.near[.stat.kurt -1 1 -1 1f;-2f;EPS];
  .tk.near[.stat.mad 1 1 2 2 4 6 9f;1f;EPS];
  z:.stat.zscore 2 4 4 4 5 5 7 9f;
  .tk.near[(avg z;dev z);0 1f;EPS];
  }]

.tk.it[`histogram;{[]
  h:.stat.histogram["f"$til 10;5];
  .tk.eq[cols h;`lo`hi`cnt];
  .tk.eq[h`cnt;2 2 2 2 2];
  .tk.near[(first h`lo;last h`hi);0 9f;EPS];
  .tk.near[1_h`lo;-1_h`hi;EPS];
  }]

.tk.it[`winsorise;{[]
  w:.stat.winsorise[0 1 2 3 4 5 6 7 8 9 100f;0.1];
  .tk.near[(min w;max w);1 9f;EPS];
  .tk.eq[count w;11];
  }]

.tk.it[`autocorrelation;{[]
  x:40#1 -1f;
  .tk.near[.stat.acf[x;0];1f;EPS];
  .tk.yes -0.9>.stat.acf[x;1];
  .tk.yes 0.9<.stat.acf[x;2];
  }]

.tk.it[`moving_regression;{[]
  x:1 2 4 7 11 16f;
  r:.stat.mreg[3;x;1+2*x];
  .tk.eq[count r;count x];
  // one point gives no line
  .tk.yes null first r`slope;
  .tk.near[1_r`slope;5#2f;1e-6];
  .tk.near[1_r`intercept;5#1f;1e-6];
  }]

.tk.it[`describe_skips_nulls;{[]
  d:.stat.describe 1 2 0n 3 4 5f;
  .tk.eq[d`n;5];
  .tk.near[d`min`q1`med`q3`max;1 2 3 4 5f;EPS];
  }]

.tk.describe`random

.tk.it[`permutations;{[]
  .rnd.seed 42;
  .tk.eq[asc .rnd.shuffle til 50;asc til 50];
  s:.rnd.sample[10;til 100];
  .tk.eq[count distinct s;10];
  .tk.yes s in til 100;
  }]

.tk.it[`choice_respects_weights;{[]
  .tk.eq[.rnd.choice[20;`a`b;1 0f];20#`a];
  c:count each group .rnd.choice[10000;`a`b;3 1f];
  .tk.near[c[`a]%10000;0.75;0.03];
  }]

.tk.it[`normal_numbers;{[]
  .rnd.seed 7;
  x:.rnd.normal 20001;
  .tk.eq[count x;20001];
  .tk.near[avg x;0f;0.05];
  .tk.near[dev x;1f;0.05];
  }]

.tk.it[`same_seed_same_numbers;{[]
  .rnd.seed 11;a:.rnd.normal 5;
  .rnd.seed 11;b:.rnd.normal 5;
  .tk.eq[a;b];
  .tk.eq[count .rnd.bootstrap[25;avg;a];25];
  }]

$[`run in key .Q.opt .z.x;.tk.finish[];.tk.runall[]]
