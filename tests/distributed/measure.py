"""Runs every comparison of engines in full, and writes the outcome: results.json and RESULTS.md.

python tests/distributed/measure.py            everything, about 25 minutes on two cores
python tests/distributed/measure.py --only parity
python tests/distributed/measure.py --render   writes RESULTS.md from results.json, no runs
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

RESULTS = Path(__file__).with_name("results.json")
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
        "| method | engine, 2 processes | loss | grad_norm | learning rate | held-out loss "
        "| accuracy |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    keys = ("loss", "grad_norm", "learning_rate", "held_out_loss", "held_out_token_accuracy")
    for row in rows:
        figures = " | ".join(f"{row['differences'][key]:.0e}" for key in keys)
        lines.append(f"| {row['method']} | {row['engine']} | {figures} |")
    return "\n".join(lines) + "\n"


def format_elastic(rows: list[dict]) -> str:
    lines = ["| started by | finished by | tensor files | same blocks | loss | grad_norm |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        same = "yes" if row["same_blocks"] else "NO"
        lines.append(
            f"| {row['before']} | {row['after']} | {row['files']} | {same} | {row['loss']:.0e} "
            f"| {row['grad_norm']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def format_failures(rows: list[dict]) -> str:
    names = {
        "": "",
        "waits_for_ever": ", the other in a call that never returns",
        "lost_machine": ", with its whole machine, the other in a call that never returns",
    }
    lines = [
        "| killed | times | inside a save | the other left within | resumed to the same bits |"
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


SECTIONS = {
    "parity": (
        """\
## Two processes and one

Largest differences between two processes under an engine, with gradient checkpointing, and one
process without, over 20 steps with clipping and uneven targets, in fp32.
""",
        format_parity,
    ),
    "elastic": (
        """\
## Another number of processes, another engine

Runs started by some processes and finished by others, compared with one process that made all
steps. Every process saved its own part.
""",
        format_elastic,
    ),
    "failures": (
        """\
## One process killed

`kill -9` of one of two processes at random moments of a run that saves at every step.
""",
        format_failures,
    ),
}

HEAD = """\
# Engines on several processes

Written by `python tests/distributed/measure.py` from results.json (`--render` writes it again
without runs); do not edit. `pytest -m distributed` runs most of it. All processes are gloo
processes on a CPU.
"""


def render(results: dict) -> str:
    """Returns the text of RESULTS.md."""
    parts = [HEAD]
    for suite, (text, format_rows) in SECTIONS.items():
        if suite in results["rows"]:
            parts.append(f"{text}\n{format_rows(results['rows'][suite])}")
    libraries = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*parts, f"{libraries}\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md")
    options = parser.parse_args()
    results_page = options.output.with_name("RESULTS.md")
    if options.render:
        results_page.write_text(render(json.loads(options.output.read_text())))
        return
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="qloop-distributed-") as folder:
            rows[name] = SUITES[name](Workspace(Path(folder) / "workspace"))
    libraries = ("torch", "accelerate", "deepspeed", "transformers", "peft", "bitsandbytes")
    results = {"versions": {name: version(name) for name in libraries}, "rows": rows}
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    results_page.write_text(render(results))
    failed = [row for found in rows.values() for row in found if not row["held"]]
    if failed:
        sys.exit(f"{len(failed)} did not hold")


if __name__ == "__main__":
    main()
