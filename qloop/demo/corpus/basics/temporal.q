/ dates, times and what lies between

/ ---- parts of a date
d:2024.02.29
parts:`year`mm`dd$d                              / 2024 2 29i
monthstart:`date$`month$d
monthend:-1+`date$1+`month$d
yearend:-1+`date$12+12 xbar`month$d              / months are counted from 2000.01m
/ days since 2000.01.01, a Saturday: 0 and 1 are the weekend
dow:{`sat`sun`mon`tue`wed`thu`fri x mod 7}
isweekday:{1<x mod 7}
/ monday of the week
weekstart:{x-(x-2)mod 7}

/ ---- ranges
days:{[a;b] a+til 1+b-a}
weekdays:{[a;b] r where isweekday r:days[a;b]}
months:{[a;b] m+til 1+(`month$b)-m:`month$a}
/ third friday, as for index options
thirdfri:{[m] f:`date$m; 14+f+(6-f mod 7)mod 7}

/ ---- holidays
hol:2024.01.01 2024.03.29 2024.12.25
isbus:{isweekday[x]and not x in hol}
nextbus:{{x+1}/[{not isbus x};x+1]}
prevbus:{{x-1}/[{not isbus x};x-1]}
/ n business days on, back for negative n
addbus:{[d;n] f:$[n<0;prevbus;nextbus]; f/[abs n;d]}

/ ---- timestamps and timespans
ts:2024.03.01D09:30:00.000000000
open:0D09:30
close:0D16:00
insession:{(`timespan$x)within(open;close)}
elapsed:{[a;b] `long$(b-a)%1000000}              / milliseconds
bucket:{[w;t] w xbar t}                          / bucket[0D00:05;ts]
todate:`date$
totime:`time$
/ minutes since the open
sincemin:{floor((`timespan$x)-open)%0D00:01}

/ ---- epochs of other systems
unixms:{`long$(x-1970.01.01D0)%1000000}
fromunixms:{1970.01.01D0+1000000*x}
excel:{1899.12.30+x}

/ ---- text
iso:{ssr[10#string x;".";"-"],"T",8#11_string x} / iso ts is "2024-03-01T09:30:00"
fromiso:{"P"$x}
yyyymmdd:{(string x)except"."}
fromyyyymmdd:{"D"$x}

/ q)addbus[2024.03.28;1]
/ 2024.04.01
/ q)thirdfri 2024.03m
/ 2024.03.15
