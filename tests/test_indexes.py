"""Block indexes beside their store: packed once, mapped, and never used when damaged."""

import threading
from pathlib import Path

import numpy as np
import pytest

import qloop.data.indexes
from qloop.data.indexes import PACKINGS, load_index
from qloop.data.packing import BlockIndex
from qloop.data.tokens import TokenStore

LENGTHS = [5, 40, 3, 17, 9, 64, 2]


@pytest.fixture
def store() -> TokenStore:
    offsets = np.cumsum([0, *LENGTHS])
    empty = np.zeros(len(LENGTHS), dtype=np.int64)
    return TokenStore(np.zeros(offsets[-1], np.uint16), offsets, empty + 1, empty, 0)


def same(a: BlockIndex, b: BlockIndex) -> bool:
    names = ("starts", "document", "first", "length")
    arrays = [np.array_equal(getattr(a, name), getattr(b, name)) for name in names]
    return a.block_length == b.block_length and all(arrays)


@pytest.fixture
def packed(monkeypatch) -> list[str]:
    """Notes every packing that is really made."""
    made: list[str] = []

    def noting(name, pack):
        def pack_and_note(positions, block_length):
            made.append(name)
            return pack(positions, block_length)

        return pack_and_note

    noted = {name: noting(name, pack) for name, pack in PACKINGS.items()}
    monkeypatch.setattr(qloop.data.indexes, "PACKINGS", noted)
    return made


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_index_from_the_cache_is_the_one_that_was_packed(tmp_path, store, packed, packing):
    first = load_index(tmp_path, store, packing, 16)
    second = load_index(tmp_path, store, packing, 16)
    assert packed == [packing]
    assert same(first, second)
    assert same(second, PACKINGS[packing](store.positions, 16))


def test_it_is_mapped_and_not_read(tmp_path, store):
    index = load_index(tmp_path, store, "best_fit", 16)
    assert isinstance(index.document, np.memmap)


def test_another_packing_or_block_length_is_another_index(tmp_path, store, packed):
    for packing, length in (("best_fit", 16), ("best_fit", 32), ("wrapped", 16)):
        load_index(tmp_path, store, packing, length)
    assert packed == ["best_fit", "best_fit", "wrapped"]


def spoil_length(folder: Path) -> None:
    file = folder / "length.npy"
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_length,
        lambda folder: (folder / "first.npy").unlink(),
        lambda folder: (folder / "starts.npy").write_bytes(b""),
        lambda folder: (folder / "document.npy").write_bytes(b"no array"),
        lambda folder: np.save(folder / "document.npy", np.zeros(3, np.int64)),
        lambda folder: np.save(
            folder / "document.npy", np.load(folder / "document.npy").clip(max=len(LENGTHS) - 2)
        ),
    ],
    ids=["truncated", "missing", "empty", "no array", "too short", "of another store"],
)
def test_an_index_that_is_not_whole_is_packed_again(tmp_path, store, packed, spoil):
    wanted = PACKINGS["best_fit"](store.positions, 16)
    load_index(tmp_path, store, "best_fit", 16)
    (folder,) = tmp_path.glob("index-*")
    spoil(folder)
    assert same(load_index(tmp_path, store, "best_fit", 16), wanted)
    assert packed == ["best_fit", "best_fit"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_several_that_build_it_at_once_end_with_one(tmp_path, store):
    found: list[BlockIndex] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_index(tmp_path, store, "best_fit", 16)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(same(index, found[0]) for index in found)
    assert len(list(tmp_path.iterdir())) == 1
