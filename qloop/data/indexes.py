"""Block indexes, kept next to their token store: packed once, memory-mapped by every process.

    <store>/index-1-best_fit-2048/    format, packing, block length
      starts.npy document.npy first.npy length.npy
      seal.txt                        hashes of these files and of the store's offsets
    <store>/packing.lock              held by the process that packs

The index of ten million documents takes a gigabyte. Mapped, its pages are in the page cache, shared
by the ranks of a machine and read when needed.
"""

import errno
import hashlib
import shutil
from pathlib import Path

import numpy as np

from qloop.data.packing import PACKINGS, BlockIndex
from qloop.data.tokens import TokenStore
from qloop.storage.folders import delete_leftovers, file_lock, hash_files, whole_folder

_FORMAT = 1
_ARRAYS = ("starts", "document", "first", "length")


def load_index(folder: Path, store: TokenStore, packing: str, block_length: int) -> BlockIndex:
    """Opens the index of a store; packs it first if it is missing or damaged.

    Several processes may call this at once: one packs, the others wait and open its result.
    `folder` is the store's; `packing` is a key of PACKINGS.

    Raises:
        OSError: The disk refuses.
    """
    path = folder / f"index-{_FORMAT}-{packing}-{block_length}"
    index = _open(path, block_length, store)
    if index is None:
        with file_lock(folder / "packing.lock"):
            index = _open(path, block_length, store)  # another process may have packed it meanwhile
            if index is None:
                _write(path, PACKINGS[packing](store.positions, block_length), store)
                index = _open(path, block_length, store)
    if index is None:
        raise OSError(errno.EIO, "differs from what was written", str(path))
    return index


def _open(path: Path, block_length: int, store: TokenStore) -> BlockIndex | None:
    """Maps an index; None if it is missing, damaged, or of another store."""
    try:
        if (path / "seal.txt").read_bytes() != _seal(path.name, path, store):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    arrays = [np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    return BlockIndex(block_length, *arrays)


def _write(path: Path, index: BlockIndex, store: TokenStore) -> None:
    """Writes an index in place of a damaged one; the caller holds the lock."""
    delete_leftovers(path.parent)
    shutil.rmtree(path, ignore_errors=True)
    with whole_folder(path) as building:
        for name in _ARRAYS:
            np.save(building / f"{name}.npy", getattr(index, name))
        (building / "seal.txt").write_bytes(_seal(path.name, building, store))


def _seal(name: str, path: Path, store: TokenStore) -> bytes:
    """Hashes an index: its name, its files, and the lengths of the store's documents."""
    files = hash_files([path / f"{name}.npy" for name in _ARRAYS])
    offsets = hashlib.sha256(np.ascontiguousarray(store.offsets).data).hexdigest()
    return f"{name} {files} {offsets}".encode()
