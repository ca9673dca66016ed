/ everyday queries, the short way and the way that scales

n:1000
quote:([]date:n#2024.03.01;time:asc n?0D06:30;sym:n?`aa`bb`cc`dd;bid:100+n?1f;ask:101+n?1f;bsize:100*1+n?10;asize:100*1+n?10)
ref:([sym:`aa`bb`cc]sector:`tech`tech`bank;lot:100 100 10)

/ last row of each sym, three ways
l1:select by sym from quote
l2:select last time,last bid,last ask by sym from quote
l3:quote value exec last i by sym from quote

/ first and last k rows of each group: take indices, then index once
topk:{[t;k] t raze value exec k sublist i by sym from t}

/ rows that are the largest of their group
best:select from quote where bid=(max;bid)fby sym

/ groups above a size; fby filters without a second table
busy:select from quote where 200<(count;i)fby sym
wide:select from quote where (ask-bid)>(avg;ask-bid)fby([]sym;60 xbar time.minute)

/ buckets
bar5:select open:first bid,high:max bid,low:min bid,close:last bid,n:count i by sym,bar:5 xbar time.minute from quote
/ unequal buckets through bin
edges:0D 0D01 0D02:30 0D05
zone:select n:count i by sym,part:edges bin time from quote

/ running values restart in each group when update has a by
run:update cum:sums bsize,chg:deltas bid,seq:til count i by sym from quote

/ weights: size-weighted mid
wm:select mid:(bsize+asize)wavg .5*bid+ask by sym from quote

/ a keyed table on the right of lj adds its columns, nulls where it has none
j:quote lj ref
nosector:exec distinct sym from j where null sector

/ keyed upsert replaces, plain insert refuses a key that is there
`ref upsert(`dd;`bank;50)
`ref upsert([]sym:`aa`ee;sector:`media`tech;lot:200 1)

/ several counts in one pass
stat:select n:count i,crossed:sum bid>=ask,thin:sum bsize<300,share:avg bsize<300 by sym from quote

/ rank inside groups, then keep the first three
ranked:update rnk:rank neg bsize by sym from quote
top3:`sym`rnk xasc select from ranked where rnk<3

/ exec with a by on one column gives a dictionary, ready to be indexed
mids:exec avg .5*bid+ask by sym from quote
rel:update rel:(.5*bid+ask)%mids sym from quote

/ a pivot: one row per bucket, one column per sym
P:asc exec distinct sym from quote
pvt:exec P#(sym!bid)by bar:30 xbar time.minute from quote
