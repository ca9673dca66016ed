"""The store: what verification finds, which checkpoints stay, and which one a path means."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
from workspace import write_checkpoint

from qloop.checkpoint.store import (
    CheckpointStore,
    DamagedError,
    Manifest,
    find_checkpoint,
    locate_checkpoints,
)
from qloop.errors import CheckpointError, LockedError
from qloop.storage.filesystem import FileSystem

CONTENTS = {"model.safetensors": bytes(range(256)), "config.json": b"{}"}


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    return CheckpointStore(tmp_path / "run/checkpoints", FileSystem())


def save(store: CheckpointStore, step: int = 1, loss: float | None = None) -> Path:
    files = [(name, [memoryview(content)]) for name, content in CONTENTS.items()]
    return write_checkpoint(store, step, files, {}, loss).path


def rotate(store: CheckpointStore, keep: int, keep_every: int = 0, keep_best: bool = True) -> list:
    said: list[str] = []
    store.rotate(keep, keep_every, keep_best, said.append)
    return said


def reopen(store: CheckpointStore) -> CheckpointStore:
    """Returns the store of another process, which has verified nothing yet."""
    return CheckpointStore(store.folder, FileSystem())


def verify(path: Path) -> Manifest:
    return CheckpointStore(path.parent, FileSystem()).verify(path)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewrite(path: Path, file: str, content: bytes) -> None:
    """Changes a file and lets manifest and COMMIT vouch for the change."""
    (path / file).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][file] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")


# Verification


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: (path / "COMMIT").unlink(), "COMMIT is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text("{}"), "not the one that COMMIT"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "model.bin").write_text(""), "model.bin was put there by someone"),
        (lambda path: rewrite(path, "model.bin", b"x"), "model.bin is no file that a checkpoint"),
        (lambda path: rewrite(path, "../x.json", b"x"), "../x.json is no file that a checkpoint"),
        (lambda path: path.rename(path.with_name("checkpoint-5")), "the checkpoint of step 1"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x"), "has 1 bytes instead of"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_its_reason(store, harm, reason):
    harm(save(store))
    [path] = store.list_checkpoints()
    with pytest.raises(DamagedError, match=reason.replace(".", r"\.")):
        verify(path)


def test_a_single_flipped_bit_is_found(store):
    path = save(store)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 4
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedError, match=r"model\.safetensors is not as it was written"):
        verify(path)


def test_a_link_in_place_of_a_file_is_refused(store, tmp_path):
    path = save(store)
    (path / "config.json").rename(tmp_path / "config.json")
    (path / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(DamagedError, match=r"config\.json is no plain file"):
        verify(path)


# The newest


def test_the_newest_good_one_is_found_and_newer_damaged_ones_are_moved_aside(store):
    paths = [save(store, step) for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / "COMMIT").unlink()
    said: list[str] = []
    kept = reopen(store).find_newest(said.append)
    assert kept is not None
    assert kept.path == paths[0]
    assert names_in(store.folder) == {
        *("checkpoint-1", "damaged-checkpoint-2", "damaged-checkpoint-3"),
    }
    assert [line.split(": ", 1)[0] for line in said] == [str(paths[2]), str(paths[1])]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_what_cannot_be_read_for_now_is_not_moved_aside(store, number):
    save(store)

    class Busy(FileSystem):
        def read(self, path: Path):
            raise OSError(number, "not now", str(path))

    with pytest.raises(OSError, match="not now"):
        CheckpointStore(store.folder, Busy()).find_newest(print)
    assert names_in(store.folder) == {"checkpoint-1"}


def test_no_checkpoint_is_newest_of_an_empty_or_missing_folder(tmp_path):
    assert CheckpointStore(tmp_path, FileSystem()).find_newest(print) is None
    assert CheckpointStore(tmp_path / "missing", FileSystem()).find_newest(print) is None


# Which checkpoints a path means


def test_a_path_means_a_runs_checkpoints_or_one_of_them(store):
    paths = [save(store, step) for step in (1, 2)]
    run = store.folder.parent
    for place in (run, store.folder):
        assert locate_checkpoints(place)[1] == paths
        assert find_checkpoint(place, print).path == paths[1]
    for place in (*paths, store.folder / "checkpoint-3"):
        located, found = locate_checkpoints(place)
        assert (located.folder, found) == (store.folder, [place])
    aside = store.set_aside(paths[0])
    assert locate_checkpoints(aside)[1] == [aside]


def test_the_newest_good_one_of_another_run_is_found_and_nothing_is_moved(store):
    paths = [save(store, step) for step in (1, 2)]
    (paths[1] / "COMMIT").unlink()
    said: list[str] = []
    assert find_checkpoint(store.folder.parent, said.append).path == paths[0]
    assert "checkpoint-2: not a good checkpoint: COMMIT is missing" in said[0]
    assert names_in(store.folder) == {"checkpoint-1", "checkpoint-2"}
    with pytest.raises(CheckpointError, match=r"COMMIT is missing\n.*checkpoint-2: no good check"):
        find_checkpoint(paths[1], said.append)


# Saving and rotating


def test_rotation_keeps_the_newest_by_number(store):
    for step in (8, 9, 10, 11):
        save(store, step)
    rotate(store, 3)
    assert names_in(store.folder) == {"checkpoint-10", "checkpoint-11", "checkpoint-9"}


def test_rotation_spares_the_best_and_every_so_many(store):
    losses = {5: 3.0, 10: 2.9, 15: 1.0, 20: 2.0, 25: None, 30: 2.5, 35: 2.4, 40: 2.3}
    for step, loss in losses.items():
        save(store, step, loss)
        rotate(store, 2, keep_every=10)
    steps = {int(name.split("-")[1]) for name in names_in(store.folder)}
    assert steps == {10, 15, 20, 30, 35, 40}


def test_the_best_goes_when_a_better_one_comes_or_it_is_not_wanted(store):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 0.5), (5, 3.0), (6, 3.0)):
        save(store, step, loss)
        rotate(store, 2)
    assert names_in(store.folder) == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}
    rotate(reopen(store), 2, keep_best=False)
    assert names_in(store.folder) == {"checkpoint-5", "checkpoint-6"}


def test_rotation_counts_only_good_ones(store):
    weights = [save(store, step) / "model.safetensors" for step in (1, 2, 3, 4)][2]
    weights.write_bytes(weights.read_bytes()[:-1])
    [said] = rotate(reopen(store), 3)
    assert names_in(store.folder) == {
        *("checkpoint-1", "checkpoint-2", "checkpoint-4", "damaged-checkpoint-3"),
    }
    assert "damaged: model.safetensors has" in said


def test_a_folder_in_the_place_of_a_save_is_moved_aside_and_kept(store):
    for _ in range(3):
        folder = store.folder / "checkpoint-1"
        folder.mkdir(exist_ok=True)
        (folder / "occupied").write_text("x")
        verify(save(store))
    kept = sorted(names_in(store.folder) - {"checkpoint-1"})
    assert kept == ["damaged-checkpoint-1", "damaged-checkpoint-1-2", "damaged-checkpoint-1-3"]
    assert (store.folder / kept[0] / "occupied").read_text() == "x"


def test_what_a_crash_left_goes_with_the_next_save_and_other_names_stay(store):
    for name in (
        ".unfinished-checkpoint-2-abcd",
        ".deleted-checkpoint-1",
        ".nfs000",
        "checkpoint-x",
    ):
        (store.folder / name / "inside").mkdir(parents=True)
    assert store.list_checkpoints() == []
    save(store)
    assert names_in(store.folder) == {"checkpoint-1", ".nfs000", "checkpoint-x"}


def test_a_process_that_has_lost_the_folder_changes_nothing_in_it(store):
    """Neither at the begin of a save nor at its end, if another process comes meanwhile."""
    save(store)
    (store.folder / ".unfinished-of-the-other").mkdir()
    calls: list[int] = []

    def check_lock() -> None:
        calls.append(1)
        if len(calls) in (1, 3):
            raise LockedError("taken")

    fenced = CheckpointStore(store.folder, FileSystem(), check_lock)
    with pytest.raises(LockedError):
        save(fenced, 2)
    assert names_in(store.folder) == {"checkpoint-1", ".unfinished-of-the-other"}
    with pytest.raises(LockedError):
        save(fenced, 2)
    assert store.list_checkpoints() == [store.folder / "checkpoint-1"]
