/ access_control.q - who may connect, and what they may call
/ Load it last, after the functions it guards.
/
/ users.csv:  user,role,salt,hash     hash = hex md5 of salt followed by password
/ Roles: reader - only the functions listed for the role, evaluated read-only
/        feed   - only async calls of the update function
/        admin  - anything

.acl.users:([user:`symbol$()]role:`symbol$();salt:();hash:());
.acl.sessions:([h:`int$()]user:`symbol$();ip:`symbol$();since:`timestamp$();calls:`long$());

.acl.allowed:`reader`feed!(
  `.api.range`.api.daily`.rdb.vwap`.rdb.snap`.gw.fetch;
  `.tp.upd`.fh.onLines);

.acl.readUsers:{[f]
  t:("SS**";enlist ",")0: f;
  .acl.users:`user xkey t;
  count t
 }

.acl.digest:{[salt;pass] raze string md5 salt,pass}

/ a line to paste into users.csv; the password itself is not kept
.acl.newLine:{[user;role;pass]
  salt:12?.Q.an;
  "," sv (string user;string role;salt;.acl.digest[salt;pass])
 }

.acl.role:{[u] .acl.users[u;`role]}

/ dotted address from the integer in .z.a
.acl.ip:{[a] `$"." sv string "i"$0x0 vs a}

/ ---- what is being called?

/ The head of the request as a symbol. Strings are parsed, never evaluated here.
.acl.head:{[q]
  f:first $[10h=type q;parse q;q];
  $[-11h=type f;f;
    f~(?);`select;
    f~(!);`update;
    `anonymous]
 }

/ brackets in a string may hide a second call among the arguments, so a reader
/ gets reval for strings; lists carry plain data and can be applied directly
.acl.evalAs:{[role;q]
  $[role=`admin;value q;
    10h=type q;reval parse q;
    value q]
 }

/ a list must not smuggle in code as an argument either
.acl.isPlain:{[q] $[10h=type q;1b;0h=type q;not any (type each q) within 100 112h;1b]}

.acl.permit:{[role;q]
  if[null role;:0b];
  if[role=`admin;:1b];
  if[not .acl.isPlain q;:0b];
  (.acl.head q) in .acl.allowed role
 }

.acl.deny:{[u;q]
  -2 string[.z.p]," denied ",string[u]," on ",string[.z.w],": ",100 sublist .Q.s1 q;
  '"permission denied"
 }

.acl.sync:{[q]
  r:.acl.role .z.u;
  if[(r=`feed) or not .acl.permit[r;q];.acl.deny[.z.u;q]];
  update calls:calls+1 from `.acl.sessions where h=.z.w;
  .acl.evalAs[r;q]
 }

.acl.async:{[q]
  r:.acl.role .z.u;
  if[not r in `feed`admin;.acl.deny[.z.u;q]];
  / feeds send lists; a string could compute its arguments
  if[(r=`feed) and 10h=type q;.acl.deny[.z.u;q]];
  if[not .acl.permit[r;q];.acl.deny[.z.u;q]];
  value q;
 }

/ ---- callbacks

.z.pw:{[u;p]
  r:.acl.users u;
  $[null r`role;0b;r[`hash]~.acl.digest[r`salt;p]]
 }

.z.po:{[w] `.acl.sessions upsert (w;.z.u;.acl.ip .z.a;.z.p;0);}
.acl.oldpc:@[get;`.z.pc;{{[w]}}];
.z.pc:{[w] delete from `.acl.sessions where h=w;.acl.oldpc w}

.z.pg:.acl.sync;
.z.ps:.acl.async;

/ no web access on this port
.z.ph:.z.pp:{[r] .h.hn["403 Forbidden";`txt;"not available"]};
.z.ws:{[m] hclose .z.w};

/ who is on, busiest first
.acl.who:{[] `calls xdesc update age:.z.p-since from 0!.acl.sessions}

.acl.readUsers `:config/users.csv;
