// call_wrappers.q: cache, retry, breaker, ipc. No sockets and no waiting here,
// hopen is never reached because .ipc.handle is stubbed, and .retry.sleep too.

\l test_kit.q
\l call_wrappers.q

.t.n:0

// fails until it has been called k times
.t.flaky:{[k;x] .t.n+:1;$[.t.n<k;'"not yet";10*x]}
.t.plus:{[x;y] .t.n+:1;x+y}
.t.boom:{[x] '"boom"}

// every test starts from the same state
.t.fresh:{[]
  .mock.reset[];
  .lru.clear[];
  .mock.stub[`.lru.cap;3];
  .mock.stub[`.cb.limit;2];
  .cb.state:0#.cb.state;
  .t.n:0;
  .mock.spy[`.retry.sleep;{[ms] ms}];}

.t.it:{[nm;f] .tk.it[nm;{[f;u] .t.fresh[];f[];}[f]]}

.tk.describe`cache

.t.it[`computes_once;{[]
  f:.lru.memo[`add;.t.plus];
  .tk.eq[f[2;3];5];
  .tk.eq[f[2;3];5];
  .tk.eq[.t.n;1];
  .tk.eq[f[3;2];5];
  .tk.eq[.t.n;2];
  }]

.t.it[`ids_keep_functions_apart;{[]
  f:.lru.memo[`plus;{[x;y] x+y}];
  g:.lru.memo[`times;{[x;y] x*y}];
  .tk.eq[(f[3;4];g[3;4]);7 12];
  }]

.t.it[`oldest_goes_first;{[]
  .lru.put'[`a`b`c;1 2 3];
  // a is used again, so b is now the oldest
  .tk.eq[.lru.fetch[`a;{[k] '"should be cached"}];1];
  .lru.put[`d;4];
  .tk.eq[asc key .lru.seen;asc`a`c`d];
  .tk.yes not .lru.has`b;
  }]

.t.it[`any_kind_of_value;{[]
  t:([]x:1 2);
  .lru.put[`t;t];
  .lru.put[`s;"text"];
  .tk.eq[.lru.vals`t;t];
  .tk.eq[.lru.vals`s;"text"];
  }]

.tk.describe`retry

.t.it[`succeeds_in_the_end;{[]
  .tk.eq[.retry.go[5;10;.t.flaky;3 7];70];
  .tk.eq[.t.n;3];
  // two pauses, the second twice as long
  .tk.eq[raze .mock.callsto`.retry.sleep;10 20];
  }]

.t.it[`gives_up;{[]
  .tk.raises[.retry.go;(2;10;.t.boom;enlist 0);"gave up: boom"];
  .tk.eq[count .mock.callsto`.retry.sleep;1];
  }]

.t.it[`no_pause_when_fine;{[]
  .tk.eq[.retry.go[3;10;neg;enlist 4];-4];
  .tk.eq[count .mock.callsto`.retry.sleep;0];
  }]

.tk.describe`breaker

.t.it[`opens_after_limit;{[]
  do[2;.tk.raises[.cb.call;(`feed;.t.boom;enlist 0);"boom"]];
  .tk.yes .cb.isopen`feed;
  .tk.raises[.cb.call;(`feed;.t.boom;enlist 0);"circuit open*"];
  // other services are not touched
  .tk.yes not .cb.isopen`other;
  }]

.t.it[`closes_after_cooling;{[]
  do[2;.tk.raises[.cb.call;(`feed;.t.boom;enlist 0);"boom"]];
  .mock.stub[`.cb.cool;-0D00:00:01];
  .tk.eq[.cb.call[`feed;neg;enlist 1];-1];
  .tk.eq[.cb.state[`feed;`fails];0];
  }]

.t.it[`success_resets_the_count;{[]
  .tk.raises[.cb.call;(`feed;.t.boom;enlist 0);"boom"];
  .cb.call[`feed;neg;enlist 1];
  .tk.raises[.cb.call;(`feed;.t.boom;enlist 0);"boom"];
  .tk.yes not .cb.isopen`feed;
  }]

.tk.describe`ipc

.t.it[`asks_through_the_handle;{[]
  .mock.stub[`.ipc.handle;{[s] {[msg] (`got;msg)}}];
  .tk.eq[.ipc.ask[`db;"1+1"];(`got;"1+1")];
  }]

.t.it[`drops_a_broken_handle;{[]
  .mock.stub[`.ipc.handle;{[s] .t.boom}];
  .mock.spy[`.ipc.drop;{[s] s}];
  .tk.raises[.ipc.ask;(`db;"1+1");"boom"];
  .tk.eq[.mock.callsto`.ipc.drop;enlist enlist`db];
  }]

if[`run in key .Q.opt .z.x;.tk.finish[]]
