"""Tries to break a run in every way there is, and writes what held: reliability.json and a table.

python tests/torture/run.py                       everything, about 20 minutes on two cores
python tests/torture/run.py --short               a short form of each, a few minutes
python tests/torture/run.py --only kills stops    some
python tests/torture/run.py --readme              puts the table of reliability.json in README.md
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

RESULTS = ROOT / "reliability.json"
SUITES = ("protocol", "corruption", "bombs", "kills", "resumes", "stops", "launched", "full_disk")
BEGIN, END = "<!-- reliability: begin -->\n", "<!-- reliability: end -->\n"


def run_suite(name: str, is_short: bool) -> list[dict]:
    """Runs a suite in a folder of its own."""
    from rows import print_rows
    from workspace import Workspace

    module = importlib.import_module(name)
    started = time.monotonic()
    is_quiet = contextlib.redirect_stdout(io.StringIO())  # of what the runs say
    with tempfile.TemporaryDirectory(prefix="qloop-torture-") as folder, is_quiet:
        rows = module.run(Workspace(Path(folder)), is_short)
    print_rows(rows)
    seconds = round(time.monotonic() - started)
    print(f"  {name}: {seconds} s", flush=True)
    return [{"suite": name, **dataclasses.asdict(row)} for row in rows]


def format_table(results: dict) -> str:
    """Shows all rows as the README does."""
    lines = [
        "| what was done | trials | held | what had to hold | noted |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        noted = "; ".join(text for text in (row["note"], row["baseline"]) if text)
        lines.append(
            f"| {row['attack']} | {row['trials']:,} | {row['survived']:,} | {row['promise']} "
            f"| {noted} |"
        )
    return "\n".join(lines) + "\n"


def write_readme(results: dict) -> None:
    """Replaces the table between the two marks in the README."""
    file = ROOT / "README.md"
    before, rest = file.read_text().split(BEGIN)
    after = rest.split(END)[1]
    libraries = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    file.write_text(f"{before}{BEGIN}{format_table(results)}\n{libraries}\n{END}{after}")


def main() -> None:
    """Runs the suites, merges their rows into reliability.json, and fails if a promise did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a short form of each")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, help="some suites")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--readme", action="store_true", help="only write the README's table")
    options = parser.parse_args()
    if options.readme:
        write_readme(json.loads(options.output.read_text()))
        return

    from qloop.report.console import quieten_libraries

    quieten_libraries()
    before = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = [row for row in before if row["suite"] not in options.only]
    for name in options.only:
        rows += run_suite(name, options.short)
    rows.sort(key=lambda row: SUITES.index(row["suite"]))
    libraries = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")
    results = {"versions": {name: version(name) for name in libraries}, "rows": rows}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(format_table(results))
    failed = [row for row in rows if row["survived"] < row["trials"]]
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} promises did not hold")


if __name__ == "__main__":
    main()
