// Strings are lists of characters; a symbol is one atom. Most tools work on strings.

\d .txt

// ---- cutting and joining
words:{[s] w where 0<count each w:" "vs s}
csv:{[s] trim each ","vs s}
path:{[xs] "/"sv xs}
ext:{[f] $["."in f;last"."vs f;""]}
lines:{[s] "\n"vs ssr[s;"\r\n";"\n"]}

// ---- searching
has:{[s;p] 0<count s ss p}
starts:{[s;p] p~(count p)#s}
ends:{[s;p] p~neg[count p]#s}
countof:{[s;p] count s ss p}
before:{[s;p] $[count i:s ss p;first[i]#s;s]}
after:{[s;p] $[count i:s ss p;(first[i]+count p)_s;""]}

// ---- changing
strip:{[s;cs] s where not s in cs}
lpad:{[n;s] neg[n]$s}
rpad:{[n;s] n$s}
zpad:{[n;x] neg[n]#(n#"0"),string x}       // x of at most n digits
cap:{[s] @[s;0;upper]}
title:{[s] " "sv cap each words lower s}
rev:reverse
repeat:{[n;s] raze n#enlist s}
squeeze:{[s] s where not(" "=s)and" "=prev s}

// ---- numbers
isint:{[s] (0<count s)and all s in .Q.n}
thousands:{[n] reverse","sv 3 cut reverse string n}
fmt:{[p;x] .Q.f[p;x]}
pct:{[x] .Q.f[1;100*x],"%"}

// ---- templates: fill["hello %who%";(enlist`who)!enlist"world"]
fill:{[t;d] {ssr[x;"%",string[y],"%";z]}/[t;key d;value d]}

// key=value pairs into a dictionary of strings
kv:{[s] (!). flip{(`$x 0;"="sv 1_x)}each"="vs/:";"vs s}

// ---- symbols
tosym:{[s] `$s}
joinsym:{[a;b] `$string[a],'"_",/:string b}
lowsym:{[s] `$lower string s}
ticker:{[s] first` vs s}                   // `abc.n gives `abc
venue:{[s] last` vs s}

// pattern match on many strings at once
matching:{[xs;p] xs where xs like p}

\d .
