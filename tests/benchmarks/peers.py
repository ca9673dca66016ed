"""Compares the speed of qloop, TRL and a plain loop on the same work.

pip install -e '.[bench]'
python tests/benchmarks/peers.py [CORPUS]     # a folder of .q files; the demo's if none is given

Each contestant trains the same model from random weights on the same documents, in a process of
its own, three times in alternation; the table has the median, the extremes, and the ratio to
qloop. Targets are positions with a label, so padding and truncated tokens do not count. MFU counts
the FLOPs of the documents trained on, relative to the fastest matrix product measured in this run.
Memory is the peak above the memory before the model was built: resident memory on a CPU, allocated
memory on a GPU. A run of all contestants updates peers.json and RESULTS.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from contestants import CONTESTANTS, Setup
from render import format_peers, save

from qloop.data.packing import pack_best_fit

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "qloop/demo"
ROUNDS = 3
CHOSEN = ("torch", "transformers", "accelerate", "trl")


def run(name: str, setup: Setup) -> dict:
    with tempfile.TemporaryDirectory(prefix="qloop-peers-") as folder:
        file = Path(folder) / "setup.json"
        file.write_text(json.dumps(setup._replace(folder=folder)._asdict()))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("contestants.py")), name, str(file)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def compare(setup: Setup, names: list[str]) -> list[dict]:
    """Runs the contestants in turn and summarises each."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(ROUNDS):
        for name in names:
            runs[name].append(run(name, setup))
            rate = runs[name][-1]["targets_per_second"]
            print(f"round {number + 1}: {name}: {rate:,.0f} targets/s", flush=True)
    product = max(result["matmul_flops"] for results in runs.values() for result in results)
    rows = []
    for name, results in runs.items():
        rates = [result["targets_per_second"] for result in results]
        rows.append(
            {
                "name": name,
                "targets_per_second": statistics.median(rates),
                "range": [min(rates), max(rates)],
                "use": statistics.median(r["flops_per_second"] for r in results) / product,
                "peak_bytes": max(result["peak_bytes"] for result in results),
                "matmul_flops": product,
            }
        )
    return rows


def measure_packing() -> float:
    """Returns tokens packed per second, for document lengths distributed like those of Q files."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.3, 100_000).astype(np.int64).clip(2, 50_000)
    started = time.perf_counter()
    pack_best_fit(lengths - 1, 2048)
    return float(lengths.sum()) / (time.perf_counter() - started)


def measure_start() -> float:
    """Returns seconds from the demo's command to its first step, with a tokenised corpus."""
    with tempfile.TemporaryDirectory(prefix="qloop-start-") as folder:
        command = [sys.executable, "-m", "qloop", "train", "--config", "configs/demo.toml"]
        command += ["--output_dir", folder, "--max_steps", "1", "--warmup_steps", "0"]
        command += ["--log_steps", "1", "--num_samples", "0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        for name in ("first", "second"):
            started = time.perf_counter()
            with subprocess.Popen(
                [*command, "--experiment_name", name],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL,
            ) as process:  # fmt: skip
                for line in process.stdout:
                    if line.startswith("step "):
                        seconds = time.perf_counter() - started
                        break
                process.communicate()
        return seconds


def describe_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{torch.get_num_threads()} cores of {names[0] if names else platform.processor()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", nargs="?", type=Path, default=DEMO / "corpus")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one more")
    options = parser.parse_args()
    setup = Setup(
        corpus=str(options.corpus.resolve()),
        model=str(DEMO / "model"),
        tokenizer=str(DEMO / "tokenizer"),
        method="full",
        batch_size=1,
        length=options.length,
        accumulation=options.accumulation,
        warmup_steps=1,
        steps=options.steps,
        precision="bf16" if torch.cuda.is_available() else "fp32",
        folder="",
        qloop_flags={},
    )
    rows = compare(setup, options.only)
    results = {
        "setup": f"a Qwen2 of 5 M parameters, vocabulary 8192, {setup.precision}, "
        f"{setup.accumulation} x {setup.length} tokens a step, {options.corpus.name}",
        "machine": describe_machine(),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in CHOSEN},
        "rows": rows,
        "packing": measure_packing(),
        "start": measure_start(),
    }
    print(f"\n{format_peers(results)}")
    if options.only == list(CONTESTANTS):
        save("peers", results)


if __name__ == "__main__":
    main()
