/ @fileOverview Descriptive statistics (.stat) and random helpers (.rnd).

/ @desc Linear interpolated quantile.
/ @param x {number[]} Sample, in any order.
/ @param p {float} Probability from 0 to 1.
/ @return {float} The quantile.
.stat.quantile:{[x;p]
  s:asc x;
  k:p*-1+count s;
  i:floor k;
  j:(i+1)&-1+count s;
  s[i]+(k-i)*s[j]-s i}

/ @desc Weighted quantile: the smallest value whose cumulated weight reaches p.
/ @param w {number[]} Weights, not negative.
/ @param x {number[]} Values.
/ @param p {float} Probability from 0 to 1.
.stat.wquantile:{[w;x;p]
  i:iasc x;
  c:sums"f"$w i;
  x[i]c binr p*last c}

/ @desc Third standardised moment (population form).
.stat.skew:{[x]
  d:x-avg x;
  (avg d*d*d)%(avg d*d)xexp 1.5}

/ @desc Excess kurtosis, 0 for a normal sample.
.stat.kurt:{[x]
  d:x-avg x;
  v:d*d;
  ((avg v*v)%avg[v]*avg v)-3}

/ @desc Median absolute deviation.
.stat.mad:{[x] med abs x-med x}

.stat.zscore:{[x] (x-avg x)%dev x}

/ @desc Histogram with n bins of equal width.
/ @param x {number[]} Sample; must not be constant.
/ @param n {long} Number of bins.
/ @return {table} Columns lo, hi and cnt. The last bin includes its upper edge.
.stat.histogram:{[x;n]
  a:min x;
  w:(max[x]-a)%n;
  b:(n-1)&floor(x-a)%w;
  ([]lo:a+w*til n;hi:a+w*1+til n;cnt:@[n#0;b;+;1])}

/ @desc Clip both tails at the quantiles p and 1-p.
.stat.winsorise:{[x;p]
  b:.stat.quantile[x]each(p;1-p);
  b[0]|b[1]&x}

/ @desc Autocorrelation at lag k.
.stat.acf:{[x;k]
  d:x-avg x;
  (sum(k _ d)*neg[k]_d)%sum d*d}

/ @desc Least squares line through each window of n points.
/ @param n {long} Window length; the first rows use what is there.
/ @param x {number[]} Explaining variable.
/ @param y {number[]} Explained variable.
/ @return {table} Columns intercept and slope, null where x does not vary.
.stat.mreg:{[n;x;y]
  k:n mcount x;
  sx:n msum x;
  sy:n msum y;
  sxy:n msum x*y;
  sxx:n msum x*x;
  b:((k*sxy)-sx*sy)%(k*sxx)-sx*sx;
  a:(sy-b*sx)%k;
  ([]intercept:a;slope:b)}

/ @desc Summary of one numeric column as a dictionary.
.stat.describe:{[x]
  x:x where not null x;
  q:.stat.quantile[x]each 0 0.25 0.5 0.75 1;
  `n`mean`sd`min`q1`med`q3`max!(count x;avg x;sdev x),q}

/ ---------------------------------------------------------------------------

/ @desc Fix the seed of the session; must not be 0.
.rnd.seed:{[n] system"S ",string n;}

/ @desc Random permutation of a list.
.rnd.shuffle:{[x] x neg[n]?n:count x}

/ @desc Sample n items without replacement.
.rnd.sample:{[n;x] x neg[n]?count x}

/ @desc Sample n items of x with replacement, with weights w.
.rnd.choice:{[n;x;w]
  i:(sums w%sum w)binr n?1f;
  x i&-1+count x}

/ @desc n standard normal numbers by Box and Muller.
.rnd.normal:{[n]
  m:(n+1)div 2;
  u:1-m?1f;
  r:sqrt -2*log u;
  a:2*acos[-1]*m?1f;
  n#(r*cos a),r*sin a}

/ @desc Bootstrap distribution of f over k resamples of x.
.rnd.bootstrap:{[k;f;x] {[f;x;i] f x count[x]?count x}[f;x]each til k}
