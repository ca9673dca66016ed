"""Runs every comparison of engines in full, and writes what it saw: distributed.json and tables.

python tests/distributed/measure.py            everything, about 25 minutes on two cores
python tests/distributed/measure.py --only parity
python tests/distributed/measure.py --readme   puts the tables of distributed.json in README.md
"""

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import elastic  # noqa: E402
import failures  # noqa: E402
import parity  # noqa: E402
from launching import Setting  # noqa: E402
from workspace import Workspace  # noqa: E402

RESULTS = ROOT / "distributed.json"
BEGIN, END = "<!-- {}: begin -->\n", "<!-- {}: end -->\n"
ENGINES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
KILLS = [(engine, rank, step) for engine in ENGINES for rank in (0, 1) for step in (5, 11, 17)]


def measure_parity(workspace: Workspace) -> list[dict]:
    references = parity.References(workspace)
    rows = []
    for method, engines in parity.CASES.items():
        for engine in [*engines, *(parity.OFFLOADED if method == "full" else ())]:
            found = parity.compare(references, method, engine)
            rows.append({**found._asdict(), "held": found.held})
            print(rows[-1], flush=True)
    return rows


def measure_elastic(workspace: Workspace) -> list[dict]:
    runs = elastic.Elastic(workspace)
    counts = [("DDP" if n > 1 else "", n) for n in elastic.COUNTS]
    pairs = [(Setting(*before), Setting(*after)) for before in counts for after in counts]
    pairs += [(Setting(a, m), Setting(b, n)) for a, m, b, n in elastic.ENGINE_PAIRS]
    rows = []
    for before, after in pairs:
        found = runs.change(before, after)
        rows.append(found._asdict() | {"before": str(before), "after": str(after)})
        rows[-1]["held"] = found.held
        print(rows[-1], flush=True)
    return rows


def measure_failures(workspace: Workspace) -> list[dict]:
    curves = failures.Curves(workspace)
    kills = [(engine, rank, step, "") for engine, rank, step in KILLS]
    kills += [("DDP", 1, 5, "waits_for_ever"), ("DDP", 1, 5, "lost_machine")]
    rows = []
    for kill in kills:
        found = failures.kill_one(curves, *kill)
        rows.append({**found._asdict(), "held": not found.failure})
        print(rows[-1], flush=True)
    return rows


SUITES = {"parity": measure_parity, "elastic": measure_elastic, "failures": measure_failures}


def format_parity(rows: list[dict]) -> str:
    lines = [
        "| method | engine, 2 processes | loss | grad_norm | rate | held-out loss | accuracy |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    keys = ("loss", "grad_norm", "learning_rate", "held_out_loss", "held_out_token_accuracy")
    for row in rows:
        figures = " | ".join(f"{row['differences'][key]:.0e}" for key in keys)
        lines.append(f"| {row['method']} | {row['engine']} | {figures} |")
    return "\n".join(lines) + "\n"


def format_elastic(rows: list[dict]) -> str:
    lines = ["| begun by | ended by | files of tensors | same blocks | loss | grad_norm |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        same = "yes" if row["same_blocks"] else "NO"
        lines.append(
            f"| {row['before']} | {row['after']} | {row['files']} | {same} | {row['loss']:.0e} "
            f"| {row['grad_norm']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def format_failures(rows: list[dict]) -> str:
    names = {"": "", "waits_for_ever": ", the other inside a call that never returns"}
    names["lost_machine"] = ", on a machine of its own with nobody there to tell, as above"
    lines = [
        "| killed | times | inside a save | the others left within | went on to the same bits |"
    ]
    lines.append("|---|---|---|---|---|")
    kinds = dict.fromkeys((row["engine"], row["fault"]) for row in rows)
    for engine, fault in kinds:
        some = [row for row in rows if (row["engine"], row["fault"]) == (engine, fault)]
        ranks = "rank 0 or 1" if len(some) > 1 else f"rank {some[0]['rank']}"
        lines.append(
            f"| {engine}, {ranks}{names[fault]} | {len(some)} "
            f"| {sum(row['in_save'] for row in some)} "
            f"| {max(row['seconds'] for row in some):.1f} s | {sum(row['held'] for row in some)} |"
        )
    return "\n".join(lines) + "\n"


FORMATS = {"parity": format_parity, "elastic": format_elastic, "failures": format_failures}


def write_readme(results: dict) -> None:
    """Replaces the tables between their marks in the README."""
    file = ROOT / "README.md"
    text = file.read_text()
    for suite, rows in results["rows"].items():
        begin, end = BEGIN.format(suite), END.format(suite)
        before, rest = text.split(begin)
        text = f"{before}{begin}{FORMATS[suite](rows)}{end}{rest.split(end)[1]}"
    file.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--readme", action="store_true", help="only write the README's tables")
    options = parser.parse_args()
    if options.readme:
        write_readme(json.loads(options.output.read_text()))
        return
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="qloop-distributed-") as folder:
            rows[name] = SUITES[name](Workspace(Path(folder) / "workspace"))
    libraries = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes")
    results = {"versions": {name: version(name) for name in libraries}, "rows": rows}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(FORMATS[name](rows[name]) for name in rows))
    failed = [row for found in rows.values() for row in found if not row["held"]]
    if failed:
        sys.exit(f"{len(failed)} did not hold")


if __name__ == "__main__":
    main()
