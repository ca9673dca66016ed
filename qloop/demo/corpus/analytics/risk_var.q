/ risk_var.q

/ d : dictionary sym!daily returns (float vectors of equal length, oldest first)
/ w : exposures in currency, in the order of key d

\d .risk

/ one-sided normal quantiles that are actually asked for
z:0.9 0.95 0.975 0.99!1.281552 1.644854 1.959964 2.326348

rets:{-1+1_ratios x}

/ p-quantile with linear interpolation between order statistics
pctl:{[p;x]
  x:asc x;
  h:p*-1+count x;
  i:`long$floor h;
  x[i]+(h-i)*x[(i+1)&-1+count x]-x i
 }

/ --- matrices ---------------------------------------------------------------
cvm:{[d] m:value d; m cov/:\:m}
crm:{[d] m:value d; m cor/:\:m}
label:{[s;m] ([] sym:s)!flip s!m}              / symmetric, so rows double as columns

/ exponentially weighted, zero mean, l near 1; newest observation weighs most
ewcvm:{[l;d]
  m:value d;
  wt:reverse l xexp til count first m;
  wt:wt%sum wt;
  (m*\:wt) mmu flip m
 }

/ pairs of names by strength of correlation, each pair once
pairs:{[d]
  s:key d; c:crm d;
  ij0:raze {x,/:(1+x)_til y}[;count s] each til count s;
  t:([] a:s ij0[;0]; b:s ij0[;1]; rho:c ./: ij0);
  t idesc abs t`rho
 }

/ --- value at risk, reported as positive losses --------------------------------
pvar:{[w;c;cl] z[cl]*sqrt w wsum c mmu w}

/ Euler split: the parts add up to pvar
component:{[w;c;cl]
  cw:c mmu w;
  z[cl]*(w*cw)%sqrt w wsum cw
 }

pnl:{[w;d] w mmu value d}
hvar:{[w;d;cl] neg pctl[1-cl;pnl[w;d]]}

/ expected shortfall: mean of what lies at or beyond the VaR
es:{[w;d;cl]
  x:pnl[w;d];
  neg avg x where x<=pctl[1-cl;x]
 }

/ Cornish-Fisher: bend the normal quantile for skew and excess kurtosis
skew:{d:x-avg x; s:dev x; (avg d*d*d)%s*s*s}
exkurt:{d:x-avg x; v:var x; -3+(avg d*d*d*d)%v*v}
cfvar:{[w;d;cl]
  x:pnl[w;d];
  s:skew x; k:exkurt x; q:neg z cl;
  a:s*(-1+q*q)%6;
  b:k*((q*q*q)-3*q)%24;
  c:s*s*((2*q*q*q)-5*q)%36;
  neg (avg x)+(dev x)*q+a+b-c
 }

/ --- drawdown on an equity curve ---------------------------------------------
dd:{-1+x%maxs x}
maxdd:{min dd x}
uwater:{n:til count x; n-fills ?[x=maxs x;n;0N]}      / bars since the last peak

/ --- was the model any good? --------------------------------------------------
/ Kupiec likelihood ratio of x exceptions in n days at level cl, chi2 with 1 df
kupiec:{[n;x;cl]
  p:1-cl; f:x%n;
  l0:((n-x)*log 1-p)+x*log p;
  l1:(0^(n-x)*log 1-f)+0^x*log f;
  -2*l0-l1
 }

report:{[w;d;cl]
  c:cvm d;
  r:`parametric`historical`cornish`shortfall;
  r!(pvar[w;c;cl];hvar[w;d;cl];cfvar[w;d;cl];es[w;d;cl])
 }

\d .
