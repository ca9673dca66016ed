/ event_study.q -- market-model event study
/
/ r : sym date ret mkt     daily returns, with the market's alongside
/ e : sym edate            events; several per symbol are fine
/
/ The model ret = alpha + beta*mkt + ar is fitted well before the event and
/ the residuals are read off around it.

/ rows (event x relative day) with the returns attached.  Day 0 is the first trading
/ day on or after the event date; days off the calendar come out null
.ev.panel:{[r;e;lo;hi]
  cal:asc exec distinct date from r;
  x:(update eid:i from e) cross ([] rel:lo+til 1+hi-lo);
  x:update date:cal[rel+cal binr edate] from x;
  x lj `sym`date xkey select sym,date,ret,mkt from r
 }

/ alpha, beta and residual sd per event
.ev.fit:{[p]
  p:select from p where not null ret,not null mkt;
  f:select nobs:count i,beta:(ret cov mkt)%var mkt,mr:avg ret,mm:avg mkt,
    rho:ret cor mkt,vr:var ret by eid from p;
  select eid,nobs,alpha:mr-beta*mm,beta,sd:sqrt vr*1-rho*rho from 0!f
 }

/ abnormal and cumulative abnormal returns; events with a thin history are left out
.ev.study:{[r;e]
  f:.ev.fit .ev.panel[r;e;-120;-21];
  w:.ev.panel[r;e;-5;10] ij `eid xkey select from f where nobs>=60;
  w:update ar:ret-alpha+beta*mkt from w;
  update car:sums 0^ar,sar:ar%sd by eid from `eid`rel xasc w
 }

/ averages across events with a cross-sectional t and the share of positive ones
.ev.summary:{[w]
  s:select n:count i,aar:avg ar,xsd:dev ar,pos:avg ar>0,z:(sum sar)%sqrt count i
    by rel from w where not null ar;
  s:update t:aar%xsd%sqrt n-1 from s;
  update caar:sums aar from s
 }

/ CAR over [a;b] for each event
.ev.car:{[w;a;b]
  select car:sum ar,days:count i by eid,sym,edate from w
    where rel within (a;b),not null ar
 }

/ ---- the same fit as a full regression -----------------------------------------
/ diagonal of a square matrix
.ev.diag:{x@'til count x}

/ y on the rows of xs (a list of float vectors), intercept added in front.
/ lsq solves y = b mmu X, so both sides have observations running along the rows
.ev.ols:{[y;xs]
  X:enlist[count[y]#1f],xs;
  b:first (enlist y) lsq X;
  e:y-b mmu X;
  d:y-avg y;
  s2:(sum e*e)%(count y)-count b;
  se:sqrt s2*.ev.diag inv X mmu flip X;
  `coef`se`t`r2`resid!(b;se;b%se;1-(sum e*e)%sum d*d;e)
 }

/ rolling beta of y on x over n points, from moving averages alone
.ev.rollbeta:{[n;y;x]
  c:mavg[n;x*y]-mavg[n;x]*mavg[n;y];
  v:mavg[n;x*x]-m*m:mavg[n;x];
  @[c%v;til (n-1)&count y;:;0n]
 }

/ small check: y = 0.5 + 2*x exactly, so coef is 0.5 2 and r2 is 1
x0:1 2 4 7 11f
show .ev.ols[0.5+2*x0;enlist x0]`coef`r2
