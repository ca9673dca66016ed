"""Measures the cost of a corpus by size: packing it, opening it, and memory while training.

python tests/benchmarks/scale.py            10 million documents; stores of 10 MB, 1 GB and 20 GB
python tests/benchmarks/scale.py --short    a million documents; stores of 10 MB and 1 GB

Token files are synthetic, with document lengths like those of code (log-normal, 1,000 tokens on
average). Every figure is measured in a process of its own. Private memory cannot be given back
(RssAnon, its peak over all micro-batches). Mapped memory is pages of the files, which all processes
share and the system drops when it needs the room (RssFile). Updates scale.json and RESULTS.md.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from render import format_scale, save

from qloop.data.batches import build_micro_batch
from qloop.data.indexes import load_index
from qloop.data.packing import Integers
from qloop.data.tokens import TokenStore
from qloop.steps import block_ids_at

BLOCK_LENGTH = 2048
MICRO_BATCHES = 5000
ARRAYS = ("offsets", "first_targets", "target_bytes")


def draw_lengths(num_documents: int) -> Integers:
    lengths = np.random.default_rng(0).lognormal(6.4, 1.0, num_documents)
    return lengths.clip(2, 200_000).astype(np.int64)


def write_store(folder: Path, lengths: Integers, with_tokens: bool) -> None:
    """Writes a store's files; without tokens the largest is a hole of the right size."""
    folder.mkdir(parents=True)
    np.save(folder / "offsets.npy", np.append(0, np.cumsum(lengths)))
    np.save(folder / "first_targets.npy", np.ones(len(lengths), np.int64))
    np.save(folder / "target_bytes.npy", lengths * 3)
    total = int(lengths.sum())
    with (folder / "tokens.bin").open("wb") as stream:
        stream.truncate(total * 4)
        for start in range(0, total if with_tokens else 0, 1 << 24):
            count = min(1 << 24, total - start)
            np.random.default_rng(start).integers(0, 150_000, count, np.uint32).tofile(stream)


def drop_from_memory(folder: Path) -> None:
    """Lets the page cache forget a folder's files, as if the machine had just started."""
    for path in folder.rglob("*.npy"):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_store(folder: Path) -> TokenStore:
    """As training opens one."""
    tokens = np.memmap(folder / "tokens.bin", np.uint32, mode="r")
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
    return TokenStore(tokens, *arrays, end_id=0)


def read_memory() -> dict[str, float]:
    """This process's memory in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":") for line in lines)
    names = {"private": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: int(found[key].split()[0]) * 1024 / 1e9 for name, key in names.items()}


def measure_open(folder: Path, packing: str) -> dict:
    """Opens store and index, packing them if they were not; seconds and memory."""
    started = time.perf_counter()
    index = load_index(folder, open_store(folder), packing, BLOCK_LENGTH)
    blocks = len(index)
    return {"seconds": time.perf_counter() - started, "blocks": blocks, **read_memory()}


def measure_training(folder: Path, packing: str) -> dict:
    """Reads micro-batches all over the corpus, as many steps of training do."""
    before = read_memory()["private"]
    started = time.perf_counter()
    store = open_store(folder)
    index = load_index(folder, store, packing, BLOCK_LENGTH)
    first = time.perf_counter()
    positions, private = 0, 0.0
    for number in range(MICRO_BATCHES):
        seen = number * len(index) // MICRO_BATCHES
        micro_batch = build_micro_batch(store, index, block_ids_at(seen, 1, len(index), 42))
        positions += micro_batch.input_ids.numel()
        private = max(private, read_memory()["private"])
    seconds = time.perf_counter() - first
    return {
        "open": first - started,
        "blocks": len(index),
        "before": before,
        "positions_per_second": positions / seconds,
        **read_memory(),
        "private": private,
    }


def measure_hashes(folder: Path, packing: str) -> dict:
    """Holds the hashes of a million documents, as tokenising does to know a copy."""
    before = read_memory()["private"]
    seen = {hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(1_000_000)}
    return {"bytes": (read_memory()["private"] - before) * 1e9 / len(seen)}


MEASURES = {"open": measure_open, "training": measure_training, "hashes": measure_hashes}


def measure(what: str, folder: Path, packing: str) -> dict:
    """Measures in a fresh process."""
    command = [sys.executable, __file__, "--measure", what, str(folder), packing]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout))


def compare_packings(folder: Path, num_documents: int) -> dict:
    """Packs a corpus of many documents and opens it again, by each packing."""
    lengths = draw_lengths(num_documents)
    write_store(folder, lengths, with_tokens=False)
    rows = []
    for packing in ("best_fit", "wrapped"):
        first, second = (measure("open", folder, packing) for _ in range(2))
        drop_from_memory(folder)
        third = measure("open", folder, packing)
        rows.append(
            {
                "packing": packing,
                "blocks": first["blocks"],
                "seconds": first["seconds"],
                "peak_gb": first["peak"],
                "reopened_seconds": second["seconds"],
                "from_disk_seconds": third["seconds"],
                "private_gb": third["private"],
            }
        )
        print(rows[-1], flush=True)
    shutil.rmtree(folder)
    return {"documents": num_documents, "tokens": int(lengths.sum()), "packing": rows}


def compare_sizes(folder: Path, sizes: list[float]) -> list[dict]:
    """Reads micro-batches from stores of several sizes."""
    rows = []
    for gigabytes in sizes:
        lengths = draw_lengths(int(gigabytes * 1e9 / 4 / 991))
        write_store(folder, lengths, with_tokens=True)
        measure("open", folder, "best_fit")  # packs
        found = measure("training", folder, "best_fit")
        rows.append(
            {
                "gigabytes": gigabytes,
                "documents": len(lengths),
                "blocks": found["blocks"],
                "open_seconds": found["open"],
                "private_before_gb": found["before"],
                "private_gb": found["private"],
                "mapped_gb": found["mapped"],
                "positions_per_second": found["positions_per_second"],
            }
        )
        print(rows[-1], flush=True)
        shutil.rmtree(folder)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="smaller sizes; writes no results")
    parser.add_argument("--folder", type=Path, help="where the token files are written")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, folder, packing = options.measure
        print(json.dumps(MEASURES[what](Path(folder), packing)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="qloop-scale-") as name:
        place = Path(name)
        results = {
            "machine": f"{os.cpu_count()} CPU cores",
            **compare_packings(place / "index", 1_000_000 if options.short else 10_000_000),
            "hash_bytes_per_document": measure("hashes", place, "")["bytes"],
            "micro_batches": MICRO_BATCHES,
            "block_length": BLOCK_LENGTH,
            "training": compare_sizes(
                place / "store", [0.01, 1] if options.short else [0.01, 1, 20]
            ),
        }
    print(f"\n{format_scale(results)}")
    if not options.short:
        save("scale", results)


if __name__ == "__main__":
    main()
