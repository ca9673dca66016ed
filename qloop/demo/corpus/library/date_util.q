// date_util.q - calendars, month arithmetic, iso weeks, time zones

\d .dt

// In q day 0 is 2000.01.01, a saturday. So d mod 7 is 0 on saturday, 1 on sunday
// and 2 on monday, which is where the odd constants below come from.

dow:{[d] `sat`sun`mon`tue`wed`thu`fri d mod 7}
isweekend:{[d] 2>d mod 7}

// ---- business days. A calendar is a name with a sorted list of holidays.

hols:(enlist`none)!enlist`date$()

addhols:{[cal;ds]
  old:$[cal in key hols;hols cal;`date$()];
  .dt.hols[cal]:asc distinct old,ds;}

isbd:{[cal;d] (1<d mod 7)and not d in hols cal}
closed:{[cal;d] not isbd[cal;d]}

// step a day at a time while the market is closed (one date only)
roll:{[cal;d] {x+1}/[closed[cal];d]}
rollback:{[cal;d] {x-1}/[closed[cal];d]}

// modified following: roll, unless that leaves the month
modfol:{[cal;d] $[(`month$d)=`month$r:roll[cal;d];r;rollback[cal;d]]}

nextbd:{[cal;d] roll[cal;d+1]}
prevbd:{[cal;d] rollback[cal;d-1]}
addbd:{[cal;n;d] $[n<0;prevbd[cal]/[neg n;d];nextbd[cal]/[n;d]]}

days:{[a;b] a+til 0|1+b-a}
bds:{[cal;a;b] d where isbd[cal;d:days[a;b]]}
nbd:{[cal;a;b] count bds[cal;a;b]}

// ---- months and quarters; these take a date or a list of dates

som:{[d] `date$`month$d}
eom:{[d] -1+`date$1+`month$d}
soq:{[d] m:`month$d;`date$m-(`long$m)mod 3}
eoq:{[d] m:`month$d;-1+`date$m+3-(`long$m)mod 3}
daysin:{[d] 1+eom[d]-som d}

// 31 jan plus one month is the last of february
addmonths:{[n;d]
  f:`date$n+`month$d;
  eom[f]&f+d-som d}

// the n-th given weekday of a month, e.g. nth[3;6;2024.03m] is its third friday
nth:{[n;wd;m]
  f:`date$m;
  f+(7*n-1)+(wd-f mod 7)mod 7}

// ---- iso 8601 weeks: the week belongs to the year of its thursday

thursday:{[d] 3+d-(d-2)mod 7}
newyear:{[y] `date$`month$12*y-2000}
isoyear:{[d] `long$`year$thursday d}
isoweek:{[d]
  t:thursday d;
  `long$1+(t-newyear`year$t)div 7}
isolabel:{[d] string[isoyear d],"-W",-2#"0",string isoweek d}

// ---- time zones. One row per change of the offset, gmt is when it took effect.

tz:([]zone:`symbol$();gmt:`timestamp$();off:`timespan$())

addzone:{[z;gmt;hours]
  new:([]zone:count[gmt]#z;gmt:gmt;off:0D01:00:00*hours);
  .dt.tz:`zone`gmt xasc tz,new;}

addzone[`utc;enlist 2000.01.01D00:00:00;enlist 0]
addzone[`cet;
  2000.01.01D00:00:00 2024.03.31D01:00:00 2024.10.27D01:00:00;
  1 2 1]
addzone[`est;
  2000.01.01D00:00:00 2024.03.10D07:00:00 2024.11.03D06:00:00;
  -5 -4 -5]

tolocal:{[z;ts]
  l:(),ts;
  r:exec gmt+off from aj[`zone`gmt;([]zone:count[l]#z;gmt:l);tz];
  $[0h>type ts;first r;r]}

togmt:{[z;ts]
  l:(),ts;
  ref:`zone`loc xasc select zone,loc:gmt+off,off from tz;
  r:exec loc-off from aj[`zone`loc;([]zone:count[l]#z;loc:l);ref];
  $[0h>type ts;first r;r]}

convert:{[a;b;ts] tolocal[b]togmt[a;ts]}

\d .
