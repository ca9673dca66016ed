/ tick_filters.q   calendar, session flags, and bad-tick rules
/ Rules only add flag columns; clean at the end is the one place that drops rows.

\d .cal

hols:2024.01.01 2024.03.29 2024.05.27 2024.07.04 2024.12.25
half:enlist 2024.07.03

/ 2000.01.01 was a Saturday, so mod 7 gives 0 Sat, 1 Sun
isbd:{(1<x mod 7)&not x in .cal.hols}
next1:{({x+1}/)[{not .cal.isbd x};x+1]}
prev1:{({x-1}/)[{not .cal.isbd x};x-1]}
days:{[a;b] d where isbd d:a+til 1+b-a}
addbd:{[d;n] $[n<0;prev1/[neg n;d];next1/[n;d]]}

/ boundaries are the start of each session; bin picks the one in force
starts:00:00 04:00 09:30 16:00 20:00
names:`closed`pre`regular`post`closed
close:{[d] ?[d in .cal.half;13:00;16:00]}

/ session of timestamps, with early closes and days off respected
session:{[ts]
  d:`date$ts; m:`minute$ts;
  s:names starts bin m;
  s:?[(s=`regular)&m>=close d;`post;s];
  ?[isbd d;s;`closed]
 }

\d .flt

/ centred median over 2k+1 prints; beyond either end the print itself stands in
cmed:{[k;p]
  lags:(neg k)+til 1+2*k;
  med each flip p^/:lags xprev\:p
 }

/ distance from the local median in robust standard deviations; the floor keeps a
/ quiet stretch from flagging one-tick moves
score:{[k;tick;p]
  d:p-cmed[k;p];
  d%tick|1.4826*med abs d
 }

/ spike: jumps by more than lim and comes straight back
spike:{[lim;p]
  r:0^log p%prev p;
  n:0^next r;
  (lim<abs r)&(lim<abs n)&0>r*n
 }

/ run of at least n identical values that ends here
stuck:{[n;p] n<=1+til[count p]-fills ?[differ p;til count p;0N]}

/ t: sym time price size, time ascending within sym
trades:{[t;tick]
  t:update badpx:(null price)|price<=0,badsz:(null size)|size<=0 from t;
  t:update off:`regular<>.cal.session time from t;
  t:update outl:8<abs .flt.score[3;tick;price],spk:.flt.spike[0.05;price] by sym from t;
  update back:time<prev time by sym from t
 }

quotes:{[q]
  q:update oneside:(null bid)|null ask from q;
  q:update crossed:(bid>ask)&not oneside,locked:(bid=ask)&not oneside from q;
  q:update wide:(ask-bid)>10*med ask-bid by sym from q;
  update stale:.flt.stuck[200;bid]&.flt.stuck[200;ask] by sym from q
 }

/ collapse the flag columns into one list of reasons per row
reasons:{[t;fl] w:fl@/:where each flip t fl; update why:w from t}

/ sequence numbers that went missing, per feed (t: feed seq time)
gaps:{[t]
  g:update skip:-1+seq-prev seq by feed from t;
  select feed,time,after:seq-1+skip,missed:skip from g where skip>0
 }

/ counts per symbol and rule, and a clean copy
tally:{[t;fl] ?[t;();(enlist`sym)!enlist`sym;fl!{(sum;x)} each fl]}
clean:{[t;fl] (fl _ t) where not max t fl}

\d .

/ fl:`badpx`badsz`off`outl`spk`back
/ f:.flt.trades[trade;0.01]
/ .flt.tally[f;fl]
/ good:.flt.clean[f;fl]
