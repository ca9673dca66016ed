"""Block indexes kept beside the token store that they belong to, packed once and mapped by all.

    <store>/index-1-best_fit-2048/    format, packing, block length
      starts.npy document.npy first.npy length.npy

Ten million documents take seconds to pack, but a gigabyte of memory in every process; mapped, the
pages are the page cache's, shared by the ranks of a machine and read as they are needed.
"""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qloop.data.packing import BlockIndex, Integers, pack_best_fit, pack_wrapped
from qloop.data.tokens import TokenStore

FORMAT = 1
PACKINGS: dict[str, Callable[[Integers, int], BlockIndex]] = {
    "best_fit": pack_best_fit,
    "wrapped": pack_wrapped,
}
_ARRAYS = ("starts", "document", "first", "length")


def load_index(folder: Path, store: TokenStore, packing: str, block_length: int) -> BlockIndex:
    """Opens the index of a store, packing it first if it was not, or if its files are damaged.

    Args:
        folder: The store's.
        store: What is packed.
        packing: A key of PACKINGS.
        block_length: Tokens in a block.

    Raises:
        OSError: The disk refuses.
    """
    path = folder / f"index-{FORMAT}-{packing}-{block_length}"
    index = _open(path, block_length, len(store))
    if index is None:
        shutil.rmtree(path, ignore_errors=True)  # what may be there is damaged
        _write(path, PACKINGS[packing](store.positions, block_length))
        index = _open(path, block_length, len(store))
        assert index is not None
    return index


def _open(path: Path, block_length: int, num_documents: int) -> BlockIndex | None:
    """Maps an index; None if there is none, or if it is not whole."""
    try:
        arrays = [np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    except (OSError, ValueError, EOFError):
        return None
    starts, document, first, length = arrays
    is_whole = len(document) == len(first) == len(length) == starts[-1]
    if not is_whole or document.max(initial=-1) != num_documents - 1:
        return None
    return BlockIndex(block_length, starts, document, first, length)


def _write(path: Path, index: BlockIndex) -> None:
    """Writes an index beside its place, and gives it its name; the first of several wins."""
    building = path.with_name(f".building-{path.name}-{uuid.uuid4().hex[:8]}")
    building.mkdir()
    try:
        for name in _ARRAYS:
            np.save(building / f"{name}.npy", getattr(index, name))
        building.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
