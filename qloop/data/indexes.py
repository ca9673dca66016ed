"""Block indexes kept beside the token store that they belong to, packed once and mapped by all.

    <store>/index-1-best_fit-2048/    format, packing, block length
      starts.npy document.npy first.npy length.npy
      seal.txt                        hashes of these files and of the store's offsets
    <store>/packing.lock              held by the process that packs

Ten million documents take seconds to pack, but a gigabyte of memory in every process; mapped, the
pages are the page cache's, shared by the ranks of a machine and read as they are needed.
"""

import contextlib
import errno
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from qloop.data.packing import BlockIndex, Integers, pack_best_fit, pack_wrapped
from qloop.data.tokens import TokenStore
from qloop.storage.folders import hash_files

FORMAT = 1
PACKINGS: dict[str, Callable[[Integers, int], BlockIndex]] = {
    "best_fit": pack_best_fit,
    "wrapped": pack_wrapped,
}
_ARRAYS = ("starts", "document", "first", "length")


def load_index(folder: Path, store: TokenStore, packing: str, block_length: int) -> BlockIndex:
    """Opens the index of a store, packing it first if it was not, or if its files are damaged.

    Several processes may ask at once: one packs, the others wait, and open what it made.

    Args:
        folder: The store's.
        store: What is packed.
        packing: A key of PACKINGS.
        block_length: Tokens in a block.

    Raises:
        OSError: The disk refuses.
    """
    path = folder / f"index-{FORMAT}-{packing}-{block_length}"
    index = _open(path, block_length, store)
    if index is None:
        with _alone(folder):
            index = _open(path, block_length, store)  # another may have made it in the meantime
            if index is None:
                _write(path, PACKINGS[packing](store.positions, block_length), store)
                index = _open(path, block_length, store)
    if index is None:
        raise OSError(errno.EIO, "reads otherwise than it was written", str(path))
    return index


def _open(path: Path, block_length: int, store: TokenStore) -> BlockIndex | None:
    """Maps an index; None if there is none, or if it is not as it was written for this store."""
    try:
        if (path / "seal.txt").read_bytes() != _seal(path.name, path, store):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    arrays = [np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    return BlockIndex(block_length, *arrays)


def _write(path: Path, index: BlockIndex, store: TokenStore) -> None:
    """Writes an index beside its place, and gives it its name; only one process does at a time."""
    building = path.with_name(".building-index")
    for leftover in (building, path):  # of a process that was killed; damaged
        shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    try:
        for name in _ARRAYS:
            np.save(building / f"{name}.npy", getattr(index, name))
        (building / "seal.txt").write_bytes(_seal(path.name, building, store))
        building.rename(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _seal(name: str, path: Path, store: TokenStore) -> bytes:
    """Hashes what an index is: its name, its files, and the lengths of the store's documents."""
    files = hash_files([path / f"{name}.npy" for name in _ARRAYS])
    offsets = hashlib.sha256(np.ascontiguousarray(store.offsets).data).hexdigest()
    return f"{name} {files} {offsets}".encode()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out while this one packs; a killed one lets go."""
    with (folder / "packing.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
