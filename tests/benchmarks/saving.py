"""Seconds for which a save blocks the loop, its commit included; the cost of hashing and syncing.

    python tests/benchmarks/saving.py [STEPS]      # 24 steps a way, a save every 6

A model of 29 million parameters is trained on the embedded corpus, once for each way to save; in
the last row, `accelerate.save_state` writes the same tensors in the same run. Figures are medians.
"""

import contextlib
import hashlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from render import format_saving
from render import save as save_results

from qloop.checkpoint import store
from qloop.checkpoint.manager import CheckpointManager
from qloop.config.loading import load_config
from qloop.distributed.engine import Engine
from qloop.report.console import quieten_libraries
from qloop.steps import Progress
from qloop.storage.filesystem import FileSystem
from qloop.train import train

ROOT = Path(__file__).parents[2]
SAVE_STEPS = 6
MODEL = {
    "model_type": "qwen2",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


class NoDigest:
    """In place of SHA-256; computes nothing."""

    def update(self, data: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return hashlib.sha256(b"").hexdigest()


class NoHashlib:
    """In place of the module."""

    @staticmethod
    def sha256(data: bytes = b"") -> NoDigest:
        return NoDigest()


@contextlib.contextmanager
def without(hashing: bool = False, syncing: bool = False):
    """Saves without a part of the work."""
    kept = store.hashlib, FileSystem.sync, FileSystem.sync_folder
    if hashing:
        store.hashlib = NoHashlib  # type: ignore[attr-defined]
    if syncing:
        FileSystem.sync = FileSystem.sync_folder = lambda self, target: None  # type: ignore
    try:
        yield
    finally:
        store.hashlib, FileSystem.sync, FileSystem.sync_folder = kept  # type: ignore


@contextlib.contextmanager
def timing(save: Callable | None) -> Iterator[list[tuple[float, float]]]:
    """Yields seconds of each save and of its commit; `save` replaces the manager's."""
    manager_save, manager_poll = CheckpointManager.save, CheckpointManager.poll
    blocked: list[tuple[float, float]] = []
    saving = False

    def timed_save(self: CheckpointManager, *values) -> None:
        nonlocal saving
        saving = True
        started = time.perf_counter()
        (save or manager_save)(self, *values)
        blocked.append((time.perf_counter() - started, 0.0))
        saving = False

    def timed_poll(self: CheckpointManager, *values, **keys) -> None:
        started = time.perf_counter()
        manager_poll(self, *values, **keys)
        if blocked and not saving:
            saved, committed = blocked[-1]
            blocked[-1] = saved, committed + time.perf_counter() - started

    CheckpointManager.save = timed_save  # type: ignore[method-assign]
    CheckpointManager.poll = timed_poll  # type: ignore[method-assign]
    try:
        yield blocked
    finally:
        CheckpointManager.save = manager_save  # type: ignore[method-assign]
        CheckpointManager.poll = manager_poll  # type: ignore[method-assign]


def measure(folder: Path, steps: int, is_async: bool, save: Callable | None = None) -> dict:
    """Trains once; returns seconds of a save, of its commit, of a step, and of the step after."""
    config = load_config(
        ROOT / "configs/demo.toml",
        {
            "output_dir": str(folder),
            "cache_dir": str(folder.parent / "cache"),
            "model_config_file": str(folder.parent / "config.json"),
            "max_steps": str(steps + 1),  # the last save is always waited for, and is left out
            "save_steps": str(SAVE_STEPS),
            "max_seq_length": "256",
            "batch_size": "2",
            "eval_steps": "0",
            "held_out_share": "0",
            "num_samples": "0",
            "keep_checkpoints": "2",
            "async_checkpoint": str(is_async).lower(),
        },
    ).config
    with timing(save) as blocked, contextlib.redirect_stdout(io.StringIO()):
        train(config, [])
    records = map(json.loads, (folder / "demo/logs/metrics.jsonl").read_text().splitlines())
    seconds = {r["step"]: r["forward_backward_seconds"] + r["update_seconds"] for r in records}
    after = [seconds[s] for s in seconds if s % SAVE_STEPS == 1 and SAVE_STEPS < s <= steps]
    others = [seconds[s] for s in seconds if s % SAVE_STEPS > 2]
    return {
        "save": statistics.median(saved for saved, _ in blocked[:-1]),
        "commit": statistics.median(committed for _, committed in blocked[:-1]),
        "step": statistics.median(others),
        "step_after": statistics.median(after),
    }


def save_by_accelerate(folder: Path) -> Callable:
    """Returns a `save` that writes the same tensors as accelerate does."""

    def save(manager: CheckpointManager, engine: Engine, progress: Progress, *_) -> None:
        if not engine.accelerator._models:
            engine.accelerator.prepare(engine.model, engine.optimizer)
        engine.accelerator.save_state(str(folder / f"state-{progress.step}"))

    return save


def main() -> None:
    """Measures each way and writes saving.json and RESULTS.md."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    os.chdir(ROOT)
    quieten_libraries()
    ways: dict[str, tuple[bool, dict]] = {
        "in the background (the default)": (True, {}),
        "synchronous (async_checkpoint = false)": (False, {}),
        "synchronous, without fsync": (False, {"syncing": True}),
        "synchronous, without SHA-256": (False, {"hashing": True}),
        "synchronous, without both": (False, {"syncing": True, "hashing": True}),
        "accelerate.save_state": (False, {}),
    }
    rows = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(MODEL))
        for number, (name, (is_async, left_out)) in enumerate(ways.items()):
            folder = Path(place) / str(number)
            save = save_by_accelerate(folder) if name.startswith("accelerate") else None
            with without(**left_out):
                result = measure(folder, steps, is_async, save)
            row = {
                "way": name,
                "blocked_seconds": result["save"],
                "commit_seconds": result["commit"],
                "share_of_step": (result["save"] + result["commit"]) / result["step"],
                "next_step_ratio": result["step_after"] / result["step"],
            }
            rows.append(row)
            print(row, flush=True)
    saves = steps // SAVE_STEPS
    results = {
        "setup": f"29 million parameters, 350 MB a checkpoint, medians of {saves} saves",
        "machine": f"torch threads: {torch.get_num_threads()}; torch {torch.__version__}",
        "rows": rows,
    }
    save_results("saving", results)
    print(format_saving(results))


if __name__ == "__main__":
    main()
