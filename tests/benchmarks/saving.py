"""How long the loop stands still for a save, and what hashing and syncing cost.

    python tests/benchmarks/saving.py [STEPS]      # 24 steps a way, a save every 6

A model of 29 million parameters is trained on the embedded corpus, once for each way to save; the
last row lets `accelerate.save_state` write the same tensors in the same run. Figures are medians.
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
from collections.abc import Callable
from pathlib import Path

import torch
from render import format_saving
from render import save as save_results

from qloop.checkpoint import store
from qloop.checkpoint.manager import CheckpointManager
from qloop.config.loading import load_config
from qloop.report.console import quieten_libraries
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
    """Stands where SHA-256 would be computed."""

    def update(self, data: memoryview) -> None:
        """Takes bytes and does nothing."""

    def hexdigest(self) -> str:
        return hashlib.sha256(b"").hexdigest()


class NoHashlib:
    """In place of the module."""

    @staticmethod
    def sha256(data: bytes = b"") -> NoDigest:
        return NoDigest()


@contextlib.contextmanager
def without(hashing: bool = False, syncing: bool = False):
    """Leaves out a part of a save."""
    kept = store.hashlib, FileSystem.sync, FileSystem.sync_folder
    if hashing:
        store.hashlib = NoHashlib  # type: ignore[attr-defined]
    if syncing:
        FileSystem.sync = FileSystem.sync_folder = lambda self, target: None  # type: ignore
    try:
        yield
    finally:
        store.hashlib, FileSystem.sync, FileSystem.sync_folder = kept  # type: ignore


def measure(folder: Path, steps: int, is_async: bool, save: Callable | None = None) -> dict:
    """Trains once; gives seconds of the loop per save, of a step, and of a step during a commit."""
    stood_still: list[float] = []
    manager_save = CheckpointManager.save

    def timed_save(self: CheckpointManager, *values) -> None:
        started = time.perf_counter()
        (save or manager_save)(self, *values)
        stood_still.append(time.perf_counter() - started)

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
    CheckpointManager.save = timed_save  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train(config, [])
    finally:
        CheckpointManager.save = manager_save  # type: ignore[method-assign]
    records = map(json.loads, (folder / "demo/logs/metrics.jsonl").read_text().splitlines())
    seconds = {r["step"]: r["forward_backward_seconds"] + r["update_seconds"] for r in records}
    after = [seconds[s] for s in seconds if s % SAVE_STEPS == 1 and SAVE_STEPS < s <= steps]
    others = [seconds[s] for s in seconds if s % SAVE_STEPS > 2]
    return {
        "stood_still": statistics.median(stood_still[:-1]),
        "step": statistics.median(others),
        "step_after": statistics.median(after),
    }


def save_by_accelerate(self: CheckpointManager, engine, progress, *_) -> None:
    """Writes the same tensors the way that accelerate does."""
    accelerator = self._accelerator
    if not accelerator._models:
        accelerator.prepare(engine.model, engine.optimizer)
    accelerator.save_state(str(self._store.folder / f"state-{progress.step}"))


def main() -> None:
    """Measures each way and writes saving.json and RESULTS.md."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    os.chdir(ROOT)
    quieten_libraries()
    ways: dict[str, tuple[bool, dict, Callable | None]] = {
        "in the background (the default)": (True, {}, None),
        "synchronous (async_checkpoint = false)": (False, {}, None),
        "synchronous, without fsync": (False, {"syncing": True}, None),
        "synchronous, without SHA-256": (False, {"hashing": True}, None),
        "synchronous, without both": (False, {"syncing": True, "hashing": True}, None),
        "accelerate.save_state": (False, {}, save_by_accelerate),
    }
    rows = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(MODEL))
        for number, (name, (is_async, left_out, save)) in enumerate(ways.items()):
            with without(**left_out):
                result = measure(Path(place) / str(number), steps, is_async, save)
            row = {
                "way": name,
                "blocked_seconds": result["stood_still"],
                "share_of_step": result["stood_still"] / result["step"],
                "next_step_ratio": result["step_after"] / result["step"],
            }
            rows.append(row)
            print(row, flush=True)
    results = {
        "setup": f"29 million parameters, medians of {steps // SAVE_STEPS} saves",
        "machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "rows": rows,
    }
    save_results("saving", results)
    print(format_saving(results))


if __name__ == "__main__":
    main()
