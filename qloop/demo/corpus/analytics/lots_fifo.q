/ ---------------------------------------------------------------------------
/ FIFO lot accounting.  Fills come in as signed quantity and price; the state
/ carries the open lots, oldest first, and the profit realised so far.
/   q  open quantities, all of one sign
/   p  their prices
/   r  realised P&L
/ A fill on the side of the open lots appends; one against them eats lots from
/ the front, and whatever is left over opens a lot the other way round.
/ ---------------------------------------------------------------------------

.lot.init:`q`p`r!(0#0;0#0f;0f)

.lot.fill:{[s;x]
  n:x 0; px:x 1;
  have:s`q; cost:s`p;
  if[(0=count have)|0<n*first have;
    :`q`p`r!(have,n;cost,px;s`r)];
  sg:signum first have;
  have:abs have;
  used:deltas (abs n)&sums have;             / eaten from each lot
  pnl:sg*sum used*px-cost;
  left:have-used;
  k:where left>0;
  rest:(abs n)-sum used;
  flip1:rest>0;                              / went through zero
  nq:(sg*left k),$[flip1;enlist rest*signum n;0#0];
  np:(cost k),$[flip1;enlist px;0#0f];
  `q`p`r!(nq;np;pnl+s`r)
 }

/ final state, and the path of states
.lot.run:{[n;px] .lot.fill/[.lot.init;flip (n;px)]}
.lot.path:{[n;px] .lot.fill\[.lot.init;flip (n;px)]}

/ all symbols.  f: sym time side price size, side 1 or -1
.lot.book:{[f]
  g:0!select n:size*side,px:price by sym from `time xasc f;
  st:.lot.run'[g`n;g`px];
  ([] sym:g`sym; pos:sum each st[;`q]; lots:count each st[;`q];
    avgcost:{(abs x) wavg y}'[st[;`q];st[;`p]]; realised:st[;`r])
 }

/ fills with running position and the P&L each one realised
.lot.blotter:{[f]
  f:`time xasc f;
  one:{[f;s]
    u:select from f where sym=s;
    st:.lot.path[u[`size]*u`side;u`price];
    update pos:sum each st[;`q],rpnl:deltas st[;`r] from u};
  raze one[f] each exec distinct sym from f
 }

/ open lots one per row, marked to px (a dictionary sym!price)
.lot.open:{[f;px]
  g:0!select n:size*side,px:price by sym from `time xasc f;
  st:.lot.run'[g`n;g`px];
  o:ungroup ([] sym:g`sym; qty:st[;`q]; cost:st[;`p]);
  update mark:px sym,upnl:qty*(px sym)-cost from o
 }

/ Same thing without a loop when sells never exceed buys: line the cumulative
/ quantities up on one axis, cut at every boundary, and each slice belongs to
/ exactly one buy and at most one sell.
.lot.match:{[bq;bp;sq;sp]
  cb:sums bq; cs:sums sq;
  cuts:asc distinct cb,cs;
  w:deltas cuts;
  m:([] qty:w; buy:bp cb binr cuts; sell:sp cs binr cuts);
  update pnl:qty*sell-buy from select from m where not null sell
 }

/ worked example: 100@10, 50@11, sell 120@12, sell 60@9 (ends 30 short at 9)
/ realised: 100*2 + 20*1 on the first sale, 30*-2 on the second = 160
fl:([] sym:4#`ZED; time:09:30 09:45 10:00 10:30; side:1 1 -1 -1;
  price:10 11 12 9f; size:100 50 120 60)
show .lot.book fl
show .lot.blotter fl
