/
  Tests for the set functions and the table diff.

  The two versions of the table below differ in every possible way: id 1 goes,
  id 4 comes, id 3 changes its price, id 2 stays as it is.
\

\l test_kit.q
\l set_diff.q

v1:([]id:1 2 3;sym:`aa`bb`cc;px:10 20 30f)
v2:([]id:2 3 4;sym:`bb`cc`dd;px:20 31 40f)

.tk.describe`sets

.tk.it[`algebra;{[]
  .tk.eq[.set.of 3 1 3 2;1 2 3];
  .tk.eq[.set.symdiff[1 2 3;2 3 4];1 4];
  .tk.yes .set.subset[1 2;3 2 1];
  .tk.yes not .set.subset[1 5;3 2 1];
  .tk.yes .set.same[1 2 2;2 1];
  .tk.yes .set.disjoint[`a`b;`c`d];
  .tk.near[.set.jaccard[1 2 3;2 3 4];0.5;1e-9];
  }]

.tk.it[`subsets;{[]
  p:.set.power`a`b`c;
  .tk.eq[count p;8];
  .tk.yes(`a`c;`a`b`c;`symbol$())in p;
  .tk.eq[count .set.combos[2;til 5];10];
  .tk.eq[.set.combos[3;`a`b`c];enlist`a`b`c];
  }]

.tk.it[`partition;{[]
  .tk.eq[.set.partition[{x>2};1 2 3 4];(3 4;1 2)];
  .tk.eq[.set.partition[{x>9};1 2];(0#0;1 2)];
  }]

.tk.it[`repeats;{[]
  .tk.eq[.set.repeats`a`b`a`c`a`b;`a`b!3 2];
  .tk.eq[count .set.repeats 1 2 3;0];
  }]

.tk.it[`merge_overlapping;{[]
  m:.set.merge(1 2;3 4;2 5;6 7;4 8);
  .tk.eq[count m;3];
  .tk.eq[asc raze m;asc 1+til 8];
  .tk.yes(asc each m)in(1 2 5;3 4 8;6 7);
  }]

.tk.describe`tdiff

.tk.it[`classifies_rows;{[]
  d:.tdiff.diff[v1;v2;`id];
  .tk.eq[.tdiff.size d;`added`removed`now!1 1 1];
  .tk.eq[exec id from d`added;enlist 4];
  .tk.eq[exec id from d`removed;enlist 1];
  .tk.eq[exec px from d`was;enlist 30f];
  .tk.eq[exec px from d`now;enlist 31f];
  }]

.tk.it[`column_order_is_ignored;{[]
  .tk.yes .tdiff.equal[v1;`px`sym`id xcols v1;`id];
  .tk.yes .tdiff.equal[v1;reverse v1;`id];
  .tk.yes not .tdiff.equal[v1;v2;`id];
  }]

.tk.it[`keyed_or_not;{[]
  .tk.eq[.tdiff.diff[`id xkey v1;`id xkey v2;`id];.tdiff.diff[v1;v2;`id]];
  }]

.tk.it[`patch_and_revert;{[]
  d:.tdiff.diff[v1;v2;`id];
  .tk.eq[.tdiff.patch[v1;`id;d];v2];
  .tk.eq[.tdiff.patch[v2;`id;.tdiff.invert d];v1];
  / an empty patch changes nothing
  .tk.eq[.tdiff.patch[v1;`id;.tdiff.diff[v1;v1;`id]];v1];
  }]

.tk.it[`compound_key;{[]
  w:update px:px+1 from v1 where sym=`bb;
  d:.tdiff.diff[v1;w;`id`sym];
  .tk.eq[.tdiff.patch[v1;`id`sym;d];w];
  }]

.tk.it[`stale_patch_is_refused;{[]
  d:.tdiff.diff[v1;v2;`id];
  moved:update px:99f from v1 where id=3;
  .tk.eq[.tdiff.safepatch[v1;`id;d];v2];
  .tk.raises[.tdiff.safepatch;(moved;`id;d);"patch does not apply"];
  }]

.tk.it[`cell_report;{[]
  c:.tdiff.cells[`id;.tdiff.diff[v1;v2;`id]];
  .tk.eq[count c;1];
  .tk.eq[first c;`id`fld`old`new!(3;`px;"30f";"31f")];
  }]

.tk.it[`bad_input;{[]
  .tk.raises[.tdiff.diff;(v1;delete px from v2;`id);"columns differ"];
  .tk.raises[.tdiff.diff;(v1,v1;v2;`id);"old key*"];
  }]

if[`run in key .Q.opt .z.x;.tk.finish[]]
