\l test_kit.q
\l date_util.q

// The calendar used throughout: two bank holidays in the week of new year, and
// the two days of christmas 2024. 2024.01.01 is a monday.
.dt.addhols[`demo;2024.01.01 2024.01.02 2024.12.25 2024.12.26];

check:.tk.it
same:.tk.eq

.tk.describe`business_days

check[`weekdays;{[]
  same[.dt.dow 2024.01.01;`mon];
  same[.dt.dow 2024.01.05 2024.01.06 2024.01.07;`fri`sat`sun];
  same[.dt.isweekend 2024.01.05 2024.01.06 2024.01.07;011b];
  }]

check[`holidays_and_weekends_are_closed;{[]
  same[.dt.isbd[`demo;2024.01.01+til 7];0011100b];
  / a calendar nobody has filled only knows weekends
  same[.dt.isbd[`none;2024.01.01+til 7];1111100b];
  }]

check[`adding_a_holiday_twice;{[]
  n:count .dt.hols`demo;
  .dt.addhols[`demo;enlist 2024.12.25];
  same[count .dt.hols`demo;n];
  }]

check[`stepping;{[]
  same[.dt.nextbd[`demo;2023.12.29];2024.01.03];
  same[.dt.prevbd[`demo;2024.01.03];2023.12.29];
  same[.dt.roll[`demo;2024.01.06];2024.01.08];
  same[.dt.addbd[`demo;3;2024.01.03];2024.01.08];
  same[.dt.addbd[`demo;-3;2024.01.08];2024.01.03];
  same[.dt.addbd[`demo;0;2024.01.06];2024.01.06];
  }]

check[`modified_following_stays_in_month;{[]
  / 2024.03.31 is a sunday, rolling forward would reach april
  same[.dt.modfol[`demo;2024.03.31];2024.03.29];
  same[.dt.modfol[`demo;2024.03.16];2024.03.18];
  }]

check[`counting;{[]
  same[.dt.nbd[`demo;2024.01.01;2024.01.07];3];
  same[.dt.nbd[`demo;2024.01.07;2024.01.01];0];
  same[.dt.bds[`demo;2024.12.24;2024.12.29];2024.12.24 2024.12.27];
  }]

.tk.describe`months

check[`month_ends;{[]
  same[.dt.eom 2024.02.10 2023.02.10 2024.12.31;2024.02.29 2023.02.28 2024.12.31];
  same[.dt.som 2024.02.10;2024.02.01];
  same[.dt.soq 2024.05.05 2024.12.31;2024.04.01 2024.10.01];
  same[.dt.eoq 2024.05.05 2024.12.31;2024.06.30 2024.12.31];
  }]

check[`add_months_clips_the_day;{[]
  same[.dt.addmonths[1;2024.01.31];2024.02.29];
  same[.dt.addmonths[-1;2024.03.31 2024.03.15];2024.02.29 2024.02.15];
  same[.dt.addmonths[12;2024.02.29];2025.02.28];
  }]

check[`third_friday;{[]
  same[.dt.nth[3;6;2024.03m];2024.03.15];
  same[.dt.nth[1;2;2024.01m];2024.01.01];
  }]

check[`iso_weeks;{[]
  same[.dt.isoweek 2024.01.01;1];
  same[.dt.isoweek 2021.01.03;53];
  same[.dt.isoyear 2021.01.03;2020];
  same[.dt.isolabel 2024.02.01;"2024-W05"];
  }]

.tk.describe`zones

check[`summer_and_winter;{[]
  same[.dt.tolocal[`cet;2024.07.01D12:00:00];2024.07.01D14:00:00];
  same[.dt.tolocal[`cet;2024.12.01D12:00:00];2024.12.01D13:00:00];
  same[.dt.tolocal[`utc;2024.07.01D12:00:00];2024.07.01D12:00:00];
  }]

check[`round_trip;{[]
  ts:2024.02.01D08:00:00+1D00:00:00*30*til 10;
  {[ts;z] same[.dt.togmt[z;.dt.tolocal[z;ts]];ts]}[ts]each`utc`cet`est;
  }]

check[`zone_to_zone;{[]
  / europe changes three weeks after america, the gap shrinks to five hours
  same[.dt.convert[`est;`cet;2024.03.01D09:00:00];2024.03.01D15:00:00];
  same[.dt.convert[`est;`cet;2024.03.15D09:00:00];2024.03.15D14:00:00];
  }]

bad:.tk.runall[]
if[`run in key .Q.opt .z.x;exit 1&bad]
