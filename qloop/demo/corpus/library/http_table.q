/
  Small read-only web front for a q process.

  Handlers take a dictionary of query arguments (symbol to text) and return a
  complete http response. Register with .web.on, then open a port.

      GET /                      list of tables
      GET /table?name=trade&n=20 one page of a table as html
      GET /csv?name=trade        the same as csv
      GET /json?name=trade       the same as json
\

.web.routes:(enlist`)!enlist(::)
.web.pagesize:50
.web.maxrows:10000

.web.on:{[path;f] .web.routes[path]:f;}

/ ---- request ----

.web.decode:{[s] .h.uh ssr[s;"+";" "]}

/ "a=1&b=x%20y" to `a`b!("1";"x y")
.web.args:{[s]
  if[0=count s;:(`symbol$())!()];
  kv:"="vs/:"&"vs s;
  (`$.web.decode each first each kv)!.web.decode each{"="sv 1_x}each kv}

/ .z.ph hands over the text after the slash: path, question mark, arguments
.web.split:{[req]
  i:req?"?";
  (`$.web.decode i#req;.web.args(1+i)_req)}

.web.num:{[a;k;default]
  $[k in key a;default^"J"$a k;default]}

.web.target:{[a]
  nm:$[`name in key a;`$a`name;`];
  if[not nm in tables`.;'"unknown table: ",string nm];
  nm}

/ ---- html ----

.web.text:{[v] $[10h=type v;v;0h>type v;string v;.Q.s1 v]}
.web.esc:{[s] ssr/[(),s;"&<>";("&amp;";"&lt;";"&gt;")]}
.web.td:{[v]
  cls:$[(abs type v)within 4 9h;"num";"txt"];
  .h.htac[`td;(enlist`class)!enlist cls;.web.esc .web.text v]}
.web.tr:{[r] .h.htc[`tr;raze .web.td each value r]}
.web.th:{[c] .h.htc[`th;.web.esc string c]}

.web.table:{[t]
  hd:.h.htc[`tr;raze .web.th each cols t];
  body:raze .web.tr each 0!t;
  .h.htac[`table;(enlist`class)!enlist"grid";hd,body]}

.web.link:{[url;txt] .h.htac[`a;(enlist`href)!enlist url;.web.esc txt]}

.web.style:"td.num{text-align:right} td,th{padding:2px 6px}"
.web.page:{[title;body]
  hd:.h.htc[`title;.web.esc title],.h.htc[`style;.web.style];
  doc:.h.htc[`head;hd],.h.htc[`body;.h.htc[`h2;.web.esc title],body];
  .h.hy[`html;"<!DOCTYPE html>",.h.htc[`html;doc]]}

/ ---- handlers ----

.web.index:{[a]
  f:{[nm]
    l:.web.link["table?name=",string nm;string nm];
    .h.htc[`li;l,": ",string[count get nm]," rows"]};
  .web.page["Tables";.h.htc[`ul;raze f each tables`.]]}

.web.listing:{[a]
  nm:.web.target a;
  n:1|.web.num[a;`n;.web.pagesize]&.web.maxrows;
  p:0|.web.num[a;`p;0];
  t:(n*p;n)sublist 0!get nm;
  url:"table?name=",string[nm],"&n=",string[n],"&p=";
  nav:.web.link[url,string 0|p-1;"back"]," ",.web.link[url,string p+1;"next"];
  .web.page[string nm;nav,.web.table t]}

.web.rows:{[a] .web.maxrows sublist 0!get .web.target a}
.web.ascsv:{[a] .h.hy[`csv;"\n"sv csv 0:.web.rows a]}
.web.asjson:{[a] .h.hy[`json;.j.j .web.rows a]}

.web.on[`;.web.index]
.web.on[`table;.web.listing]
.web.on[`csv;.web.ascsv]
.web.on[`json;.web.asjson]

/ ---- dispatch ----

.web.fail:{[e] .h.hn["400 Bad Request";`txt;"error: ",e]}
.web.serve:{[req]
  r:.web.split req;
  if[not r[0]in key .web.routes;:.h.hn["404 Not Found";`txt;"no such page"]];
  @[.web.routes r 0;r 1;.web.fail]}

.z.ph:{[x] .web.serve first x}
