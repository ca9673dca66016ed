"""On GPUs: compares the engines of launch/ on a model with the shape of Qwen2.5-0.5B.

    python tests/gpu/engines.py [--steps 30] [--processes 1] [--hidden_size 896] [--out DIR]

For full and lora: 30 steps in bf16 under DDP, FSDP2, ZeRO-2 and ZeRO-3 on all GPUs, with a save in
the middle, and then the same command again from that save. Prints the first and last loss, the
largest difference to the first row, whether the resumed steps repeat, tokens/s, peak memory, and
the blocking time of a save. Without a GPU it uses two gloo processes, only to try the script. An
engine that is not installed, or fails, has the reason in its row.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from compare_with_cpu import ROOT, build_base

ENGINES = {
    "DDP": "multi_gpu.yaml",
    "FSDP2": "fsdp2.yaml",
    "ZeRO-2": "deepspeed_zero2.yaml",
    "ZeRO-3": "deepspeed_zero3.yaml",
}
METHODS = ("full", "lora")
HAS_GPU = torch.cuda.is_available()


def command(engine: str, method: str, arguments: argparse.Namespace, out: Path) -> list[str]:
    """Builds the command line of a run."""
    steps, processes = arguments.steps, arguments.processes
    program = ["-m", "qloop"]
    if not HAS_GPU and engine != "DDP":
        program = [str(ROOT / "tests/distributed/on_cpu.py")]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / "launch" / ENGINES[engine])),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        *program,
        *("train", "--model_name", str(arguments.out / "base"), "--training_method", method),
        *("--train_file", str(ROOT / "qloop/demo/corpus"), "--output_dir", str(out)),
        *("--experiment_name", f"{method}-{engine}", "--max_seq_length", str(arguments.length)),
        *("--batch_size", "2", "--gradient_accumulation_steps", "2", "--warmup_steps", "5"),
        *("--learning_rate", "1e-4" if method == "full" else "1e-3", "--max_steps", str(steps)),
        *("--eval_steps", "0", "--save_steps", str(steps // 2), "--num_samples", "0"),
        *("--held_out_share", "0.1"),
        *(("--lora_dropout", "0") if method == "lora" else ()),
    ]


def run(words: list[str], folder: Path) -> tuple[list[dict], str]:
    """Runs to the end; returns the metrics and the last line of an error, if any."""
    done = subprocess.run(
        words,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    (folder.parent / f"{folder.name}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or ": " in line]
        return [], (lines or ["no message"])[0][:120]
    lines = (folder / "logs/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], ""


def compare(engine: str, method: str, arguments: argparse.Namespace, first: list[dict]) -> str:
    """Returns the row of an engine; `first` receives the curve to compare the others with."""
    folder = arguments.out / f"{method}-{engine}"
    words = command(engine, method, arguments, arguments.out)
    curve, reason = run(words, folder)
    if reason:
        return f"| {method} | {engine} | failed: {reason} |" + " |" * 6
    first.extend(curve if not first else [])
    shutil.rmtree(folder / f"checkpoints/checkpoint-{arguments.steps}")
    again, reason = run(words, folder)
    repeats = reason or str([r["loss"] for r in again] == [r["loss"] for r in curve])
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(curve, first, strict=True))
    speed = sorted(record["tokens_per_second"] for record in curve[5:])
    log = (folder.parent / f"{folder.name}.log").read_text().splitlines()
    mark = "blocked the loop for "
    blocked = [line.split(mark)[1][:-1] for line in log if mark in line]
    peak = (curve[-1].get("peak_memory_bytes") or 0) / 2**30
    return (
        f"| {method} | {engine} | {curve[0]['loss']:.4f} | {curve[-1]['loss']:.4f} "
        f"| {difference:.1e} | {repeats} | {speed[len(speed) // 2]:,.0f} | {peak:.1f} "
        f"| {blocked[0] if blocked else '-'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--hidden_size", type=int, default=896)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.out = (arguments.out or Path(tempfile.mkdtemp())).resolve()
    device = torch.cuda.get_device_name() if HAS_GPU else "no GPU, so the CPU is used"
    print(f"{device} x {arguments.processes}; torch {torch.__version__}")
    build_base(arguments.out / "base", arguments.hidden_size)
    print("| method | engine | first loss | last loss | from the first row | repeats | targets/s "
          "| peak GiB | a save |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for method in arguments.methods:
        first: list[dict] = []
        for engine in arguments.engines:
            print(compare(engine, method, arguments, first), flush=True)


if __name__ == "__main__":
    main()
