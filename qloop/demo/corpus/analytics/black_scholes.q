/ black_scholes.q
/ European options on a spot with a continuous carry.
/   cp  1 call, -1 put       s spot     k strike     t years
/   r   continuously compounded rate    y dividend (or foreign) yield
/   v   volatility, 0.2 for 20%
/ All of it works on atoms and on conforming vectors.

.bs.npdf:{0.3989422804014327*exp -0.5*x*x}

/ cumulative normal, Abramowitz & Stegun 26.2.17, absolute error below 1e-7.
/ Right-to-left evaluation makes Horner's rule read like the polynomial.
.bs.ncdf:{
  t:1%1+0.2316419*abs x;
  c:t*0.319381530+t*-0.356563782+t*1.781477937+t*-1.821255978+t*1.330274429;
  abs (x>0)-c*.bs.npdf x
 }

.bs.d1:{[s;k;t;r;y;v] ((log s%k)+t*(r-y)+0.5*v*v)%v*sqrt t}

.bs.price:{[cp;s;k;t;r;y;v]
  d1:.bs.d1[s;k;t;r;y;v];
  d2:d1-v*sqrt t;
  a:s*(exp neg y*t)*.bs.ncdf cp*d1;
  b:k*(exp neg r*t)*.bs.ncdf cp*d2;
  cp*a-b
 }

/ --- sensitivities ------------------------------------------------------------
.bs.delta:{[cp;s;k;t;r;y;v] cp*(exp neg y*t)*.bs.ncdf cp*.bs.d1[s;k;t;r;y;v]}
.bs.gamma:{[s;k;t;r;y;v] (exp neg y*t)*.bs.npdf[.bs.d1[s;k;t;r;y;v]]%s*v*sqrt t}
.bs.vega:{[s;k;t;r;y;v] s*(exp neg y*t)*(sqrt t)*.bs.npdf .bs.d1[s;k;t;r;y;v]}

/ theta per calendar day by revaluation, which also covers the carry terms
.bs.theta:{[cp;s;k;t;r;y;v]
  h:1%365;
  .bs.price[cp;s;k;t-h;r;y;v]-.bs.price[cp;s;k;t;r;y;v]
 }

/ --- implied volatility ---------------------------------------------------------
/ bisection on one option: g is a function of v alone, increasing.  over with an
/ integer runs the halving a fixed number of times
.bs.bisect:{[g;target]
  halve:{[g;target;b]
    m:avg b;
    $[target<g m;(b 0;m);(m;b 1)]};
  avg halve[g;target]/[50;1e-4 5f]
 }

/ no-arbitrage bounds on the premium; outside them there is no volatility to find
.bs.bounds:{[cp;s;k;t;r;y]
  fs:s*exp neg y*t;
  fk:k*exp neg r*t;
  (0|cp*fs-fk;$[cp>0;fs;fk])
 }

.bs.iv:{[cp;s;k;t;r;y;px]
  b:.bs.bounds[cp;s;k;t;r;y];
  if[(px<=b 0)|px>=b 1; :0n];
  .bs.bisect[.bs.price[cp;s;k;t;r;y];px]
 }

/ Newton, all options of a chain at once; the clamp keeps a wild step in range.
/ Far wings have no vega and keep whatever they got: check the residual column
.bs.newton:{[cp;s;k;t;r;y;px]
  step:{[f;g;px;v] 1e-3|5f&v-(f[v]-px)%1e-10|g v};
  f:.bs.price[cp;s;k;t;r;y];
  g:.bs.vega[s;k;t;r;y];
  v:step[f;g;px]/[12;(count px)#0.3];
  ([] iv:v; resid:px-f v)
 }

/ chain: cp k t px, for one underlying
.bs.chain:{[c;s;r;y]
  n:.bs.newton[c`cp;s;c`k;c`t;r;y;c`px];
  x:update iv:?[1e-4>abs resid;iv;0n] from c,'n;
  x:update fwd:s*exp t*r-y from x;
  x:update dlt:.bs.delta[cp;s;k;t;r;y;iv],mny:(log k%fwd)%sqrt t from x;
  delete resid,fwd from x
 }

/ forward implied by parity at a strike where both sides trade
.bs.parity:{[call;put;k;t;r] k+(call-put)*exp r*t}

/ example: at the money, one year, 20%: about 10.45, and back again
p:.bs.price[1;100f;100f;1f;0.05;0f;0.2]
show p
show .bs.iv[1;100f;100f;1f;0.05;0f;p]
