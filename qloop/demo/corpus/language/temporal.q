/ dates, times and the arithmetic between them

/ days are counted from 2000.01.01, a Saturday: mod 7 gives 0 Sat, 1 Sun, 2 Mon ...
.cal.names:`sat`sun`mon`tue`wed`thu`fri
.cal.dow:{.cal.names x mod 7}
.cal.hols:2024.01.01 2024.03.29 2024.05.27

.cal.isbiz:{(1<x mod 7)&not x in .cal.hols}

/ step at least one day, then keep stepping until a business day is reached
.cal.nextbiz:{{x+1}/[{not .cal.isbiz x};x+1]}
.cal.prevbiz:{{x-1}/[{not .cal.isbiz x};x-1]}
.cal.addbiz:{[d;n] $[n<0;.cal.prevbiz/[neg n;d];.cal.nextbiz/[n;d]]}
.cal.bizdays:{[a;b] r where .cal.isbiz r:a+til 1+b-a}

.cal.dow 2024.03.04                             / `mon
.cal.nextbiz 2024.03.28                            / 2024.04.01, over a holiday weekend
count .cal.bizdays[2024.03.25;2024.04.01]       / 5

/ months: cast down to the month, do arithmetic there, cast back to a date
.cal.som:{`date$`month$x}
.cal.eom:{-1+`date$1+`month$x}
.cal.soq:{`date$3 xbar `month$x}
.cal.monday:{`week$x}
.cal.leap:{(0=x mod 4)&(0<x mod 100)|0=x mod 400}
.cal.dim:{("d"$1+x)-"d"$x}                      / days in month
.cal.monthdays:{d+til ("d"$1+x)-d:"d"$x}        / every date in a month

.cal.eom 2024.02.10                             / 2024.02.29
.cal.soq 2024.05.27                             / 2024.04.01
.cal.leap 1900 2000 2023 2024                   / 0101b

/ add months but never run past the end of the target month
.cal.addmonths:{[d;n]
  m:n+`month$d;
  ("d"$m)+(-1+`dd$d)&-1+.cal.dim m
 }
.cal.addmonths[2024.01.31;1]                    / 2024.02.29

/ third Friday of a month (Friday is 6)
.cal.thirdfri:{d:"d"$x; d+14+(6-d mod 7)mod 7}
.cal.thirdfri 2024.03m                          / 2024.03.15

/ combining and taking apart
ts:2024.03.04+0D09:33:12.5
`date`minute`second$\:ts                        / 2024.03.04, 09:33, 09:33:12
0D00:05 xbar ts                                 / 2024.03.04D09:30:00.000000000
16:00:00.000-09:30:00.000                       / 06:30:00.000
09:30:00.000%01:00:00.000                       / 9.5 hours

/ whole seconds since 1970 and back again
.cal.epoch:{(`long$x-1970.01.01D00:00:00) div 1000000000}
.cal.unepoch:{1970.01.01D00:00:00+1000000000*x}
.cal.epoch 2024.03.04D00:00:00                  / 1709510400

/ text in, text out
"D"$("20240304";"2024-03-04")                   / the same date twice
"-" sv "." vs string 2024.03.04                 / "2024-03-04"

/ five-minute counts over a random session
ticks:([] ts:asc 2024.03.04D09:30+200?0D06:30; px:100+200?1f)
bars:select n:count i, lo:min px, hi:max px by bkt:0D00:05 xbar ts from ticks

/ gaps of more than three minutes between neighbouring ticks
gaps:select from (update gap:ts-prev ts from ticks) where gap>0D00:03
