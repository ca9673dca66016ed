"""Block indexes beside their store: packed once, mapped, and never used when damaged."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import qloop.data.indexes
from qloop.data.indexes import load_index
from qloop.data.packing import PACKINGS, BlockIndex
from qloop.data.tokens import TokenStore

LENGTHS = [5, 40, 3, 17, 9, 64, 2]


def build_store(lengths: list[int]) -> TokenStore:
    offsets = np.cumsum([0, *lengths])
    empty = np.zeros(len(lengths), dtype=np.int64)
    return TokenStore(np.zeros(offsets[-1], np.uint16), offsets, empty + 1, empty, 0)


@pytest.fixture
def store() -> TokenStore:
    return build_store(LENGTHS)


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


def index_of(folder: Path) -> Path:
    (path,) = folder.glob("index-*")
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "length.npy").write_bytes(b"no array"),
        lambda folder: (folder / "first.npy").unlink(),
        lambda folder: (folder / "starts.npy").write_bytes(b""),
        lambda folder: (folder / "seal.txt").write_bytes(b""),
        lambda folder: (folder / "seal.txt").unlink(),
        lambda folder: np.save(folder / "document.npy", np.zeros(3, np.int64)),
    ],
    ids=["no array", "missing", "empty", "empty seal", "no seal", "too short"],
)
def test_an_index_that_is_not_whole_is_packed_again(tmp_path, store, packed, spoil):
    wanted = PACKINGS["best_fit"](store.positions, 16)
    load_index(tmp_path, store, "best_fit", 16)
    spoil(index_of(tmp_path))
    assert same(load_index(tmp_path, store, "best_fit", 16), wanted)
    assert packed == ["best_fit", "best_fit"]
    assert names_in(tmp_path) == ["index-1-best_fit-16", "packing.lock"]


@pytest.mark.parametrize("name", ["starts", "document", "first", "length"])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path, store, packed, name):
    """In the header too, where it may turn integers into floats."""
    wanted = PACKINGS["best_fit"](store.positions, 16)
    load_index(tmp_path, store, "best_fit", 16)
    file = index_of(tmp_path) / f"{name}.npy"
    places = range(0, file.stat().st_size, 5)
    for place in places:
        content = bytearray(file.read_bytes())
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        assert same(load_index(tmp_path, store, "best_fit", 16), wanted)
    assert len(packed) == 1 + len(places)


def test_an_index_of_another_store_is_not_used(tmp_path, store, packed):
    """As many documents of the same lengths, in another order."""
    other = build_store(LENGTHS[::-1])
    (tmp_path / "other").mkdir()
    load_index(tmp_path / "other", other, "best_fit", 16)
    shutil.copytree(index_of(tmp_path / "other"), tmp_path / "index-1-best_fit-16")
    found = load_index(tmp_path, store, "best_fit", 16)
    assert packed == ["best_fit", "best_fit"]
    assert same(found, PACKINGS["best_fit"](store.positions, 16))


def test_an_index_of_another_packing_is_not_used(tmp_path, store, packed):
    load_index(tmp_path, store, "best_fit", 16)
    index_of(tmp_path).rename(tmp_path / "index-1-wrapped-16")
    assert same(
        load_index(tmp_path, store, "wrapped", 16), PACKINGS["wrapped"](store.positions, 16)
    )


def test_what_a_killed_process_left_is_deleted(tmp_path, store):
    leftover = tmp_path / ".building-index-1-best_fit-16-0123abcd"
    leftover.mkdir()
    (leftover / "in-use.lock").touch()
    (leftover / "starts.npy").write_bytes(b"half")
    load_index(tmp_path, store, "best_fit", 16)
    assert names_in(tmp_path) == ["index-1-best_fit-16", "packing.lock"]


def test_one_packs_while_the_others_wait_and_a_killed_one_lets_go(tmp_path, store):
    code = (
        "import sys, time; from pathlib import Path; from qloop.storage.folders import file_lock\n"
        "with file_lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "packing.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as packing:
        try:
            assert packing.stdout.readline() == b"locked\n"
            found: list[BlockIndex] = []
            waiting = threading.Thread(
                target=lambda: found.append(load_index(tmp_path, store, "best_fit", 16))
            )
            waiting.start()
            waiting.join(0.5)
            assert found == []
        finally:
            packing.kill()
        waiting.join(60)
    assert same(found[0], PACKINGS["best_fit"](store.positions, 16))


def test_of_several_that_want_it_at_once_one_packs(tmp_path, store, packed):
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
    assert packed == ["best_fit"]
