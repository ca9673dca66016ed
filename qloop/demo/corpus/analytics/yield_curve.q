/ Zero curves and plain bonds.
/ A curve is a dictionary `t`z: times in years ascending, continuous zero rates.

/ linear between knots, flat beyond the ends
.yc.lin:{[xs;ys;x]
  x:(first xs)|x&last xs;
  i:0|(xs bin x)&-2+count xs;
  ys[i]+(x-xs i)*(ys[i+1]-ys i)%xs[i+1]-xs i
 }

.yc.zero:{[c;t] .yc.lin[c`t;c`z;t]}
.yc.df:{[c;t] exp neg t*.yc.zero[c;t]}

/ interpolate log discount factors instead: piecewise constant forwards
.yc.dflog:{[c;t] exp .yc.lin[0f,c`t;0f,neg c[`t]*c`z;t]}

/ continuously compounded forward between a and b
.yc.fwd:{[c;a;b] (log .yc.df[c;a]%.yc.df[c;b])%b-a}

/ annual par rates 1,2,3..n years -> curve; each discount factor needs the earlier
/ ones: D = (1 - s*sum D) / (1+s)
.yc.boot:{[s]
  d:{x,(1-y*sum x)%1+y}/[0#0f;s];
  t:1f+til count s;
  `t`z!(t;neg (log d)%t)
 }

/ the par rate of an n-year annual bond, which should give the inputs back
.yc.par:{[c;n] d:.yc.df[c;1f+til n]; (1-last d)%sum d}

.yc.bump:{[c;bp] @[c;`z;+;bp*1e-4]}

/ Nelson-Siegel for a given tau is linear in three betas, so lsq does the work; tau
/ itself is searched on a grid
.yc.nsbasis:{[tau;t]
  u:t%tau;
  a:(1-exp neg u)%u;
  (count[t]#1f;a;a-exp neg u)
 }
.yc.nsfit:{[t;z]
  one:{[t;z;tau]
    X:.yc.nsbasis[tau;t];
    b:first (enlist z) lsq X;
    e:z-b mmu X;
    `tau`b`sse!(tau;b;sum e*e)};
  f:one[t;z] each 0.25*1+til 40;
  f first iasc f[;`sse]
 }
.yc.nsval:{[f;t] f[`b] mmu .yc.nsbasis[f`tau;t]}

/ ---- bonds per 100 face: c coupon (0.05), m payments a year, n payments left -------
.bd.flows:{[c;m;n] @[n#100*c%m;n-1;+;100f]}
.bd.times:{[m;n] (1+til n)%m}

/ off the curve
.bd.fair:{[cv;c;m;n] .bd.flows[c;m;n] wsum .yc.df[cv;.bd.times[m;n]]}

/ off a yield compounded m times a year
.bd.price:{[c;m;n;y] .bd.flows[c;m;n] wsum (1+y%m) xexp neg 1+til n}

/ Macaulay, modified, convexity and the value of a basis point
.bd.risk:{[c;m;n;y]
  k:1+til n;
  pv:.bd.flows[c;m;n]*(1+y%m) xexp neg k;
  px:sum pv;
  mac:(pv wsum k%m)%px;
  mdur:mac%1+y%m;
  cx:(pv wsum k*k+1)%px*m*m*(1+y%m) xexp 2;
  `price`mac`mdur`convex`dv01!(px;mac;mdur;cx;px*mdur*1e-4)
 }

/ yield from price: Newton with the analytic slope -price*modified duration;
/ over without a count stops when two iterates match
.bd.yield:{[c;m;n;px]
  f:{[c;m;n;px;y]
    r:.bd.risk[c;m;n;y];
    y+(r[`price]-px)%r[`price]*r`mdur};
  f[c;m;n;px]/[c]
 }

/ key-rate durations: bump one knot at a time
.bd.krd:{[cv;c;m;n]
  p0:.bd.fair[cv;c;m;n];
  up:{[cv;c;m;n;i] .bd.fair[.[cv;(`z;i);+;1e-4];c;m;n]};
  cv[`t]!(p0-up[cv;c;m;n] each til count cv`t)%p0*1e-4
 }

cv:.yc.boot 0.031 0.033 0.0345 0.0355 0.036
show .yc.par[cv] each 1 3 5              / 0.031 0.0345 0.036
show .bd.yield[0.04;2;10;100f]           / at par the yield is the coupon
