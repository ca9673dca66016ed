"""Attacks runs and checkpoints in many ways, and writes the outcome: results.json and RESULTS.md.

python tests/torture/run.py                       everything, about 20 minutes on two cores
python tests/torture/run.py --short               a short form of each, a few minutes
python tests/torture/run.py --only kills stops    some
python tests/torture/run.py --render              writes RESULTS.md from results.json, no attacks
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

RESULTS = Path(__file__).with_name("results.json")
SUITES = ("protocol", "corruption", "bombs", "kills", "resumes", "stops", "launched", "full_disk")

HEAD = """\
# Attacks on runs and checkpoints

Written by `python tests/torture/run.py` from results.json (`--render` writes it again without
attacks); do not edit. `pytest` and `pytest -m distributed` run a short form. On a simulated disk,
a loss of power may lose any part of the data that was not synced.
"""


def run_suite(name: str, is_short: bool) -> list[dict]:
    """Runs a suite in a temporary folder."""
    from rows import print_rows
    from workspace import Workspace

    module = importlib.import_module(name)
    started = time.monotonic()
    is_quiet = contextlib.redirect_stdout(io.StringIO())  # the runs' own output
    with tempfile.TemporaryDirectory(prefix="qloop-torture-") as folder, is_quiet:
        rows = module.run(Workspace(Path(folder)), is_short)
    print_rows(rows)
    seconds = round(time.monotonic() - started)
    print(f"  {name}: {seconds} s", flush=True)
    return [{"suite": name, **dataclasses.asdict(row)} for row in rows]


def render(results: dict) -> str:
    """Returns the text of RESULTS.md."""
    lines = ["| attack | trials | held | promise | notes |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        notes = "; ".join(text for text in (row["note"], row["baseline"]) if text)
        lines.append(
            f"| {row['attack']} | {row['trials']:,} | {row['survived']:,} | {row['promise']} "
            f"| {notes} |"
        )
    libraries = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([HEAD, *lines, "", libraries, ""])


def main() -> None:
    """Runs the suites, merges their rows into results.json, and fails if a promise did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a short form of each")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, help="some suites")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md")
    options = parser.parse_args()
    results_page = options.output.with_name("RESULTS.md")
    if options.render:
        results_page.write_text(render(json.loads(options.output.read_text())))
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
    results_page.write_text(render(results))
    failed = [row for row in rows if row["survived"] < row["trials"]]
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} promises did not hold")


if __name__ == "__main__":
    main()
