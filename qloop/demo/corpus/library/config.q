/
  config.q

  Settings come from four places, the later one wins:

    1. the defaults given by the caller
    2. a file, either key=value lines (.conf) or a name,val table (.csv)
    3. environment variables with a prefix
    4. the command line

  The type of a default decides how the text of an override is read, so there is
  no separate schema to keep in step with the code.
\

.cfg.current:(`symbol$())!()
.cfg.truthy:(enlist"1";enlist"y";"yes";"true";"on")

/ turn the text txt into the type of the default
.cfg.coerce:{[default;txt]
  t:type default;
  $[10h=t;txt;
    -1h=t;any lower[txt]~/:.cfg.truthy;
    t<0h;upper[.Q.t neg t]$txt;
    t within 1 19h;upper[.Q.t t]$trim each","vs txt;
    txt]}

/ lay a dictionary of name!text over a dictionary of typed values
.cfg.overlay:{[base;over]
  extra:key[over]except key base;
  if[count extra;'"unknown setting: ",", "sv string extra];
  k:key over;
  new:.cfg.coerce'[base k;value over];
  bad:k where{$[0h>type x;null x;0b]}each new;
  if[count bad;'"cannot read setting: ",", "sv string bad];
  base,k!new}

/ key=value lines; blank lines and lines that start with a hash are skipped
.cfg.readconf:{[path]
  ls:trim each read0 path;
  ls:ls where 0<count each ls;
  ls:ls where not"#"=first each ls;
  if[0=count ls;:(`symbol$())!()];
  if[count bad:where not"="in/:ls;'"no equals sign: ",ls first bad];
  i:ls?'"=";
  (`$trim each i#'ls)!trim each(1+i)_'ls}

.cfg.readcsv:{[path]
  exec name!val from("S*";enlist",")0:path}

.cfg.readfile:{[path]
  if[()~key path;:(`symbol$())!()];
  $[path like"*.csv";.cfg.readcsv path;.cfg.readconf path]}

/ APP_PORT overrides port when the prefix is "APP_"
.cfg.readenv:{[prefix;names]
  v:getenv each`$prefix,/:upper string names;
  w:where 0<count each v;
  names[w]!v w}

/ switches such as -verbose carry no value and only turn a boolean on
.cfg.cmdline:{[base;args]
  opts:.Q.opt args;
  flags:(where -1h=type each base)inter key opts;
  base:@[base;flags;:;1b];
  rest:(key[base]inter key opts)except flags;
  .Q.def[base;rest#opts]}

.cfg.usage:{[base]
  left:(2+max count each string key base)$string key base;
  -1"  -",/:left,'" default: ",/:.Q.s1 each value base;}

.cfg.init:{[defaults;path;prefix]
  c:.cfg.overlay[defaults;.cfg.readfile path];
  c:.cfg.overlay[c;.cfg.readenv[prefix;key c]];
  c:.cfg.cmdline[c;.z.x];
  .cfg.current:c;
  c}

.cfg.lookup:{[name]
  $[name in key .cfg.current;.cfg.current name;'"no such setting: ",string name]}

/ example
/ .cfg.init[`port`env`rate`verbose`syms!(5010;`dev;0.25;0b;`abc`xyz);`:app.conf;"APP_"]
/ .cfg.lookup`port
