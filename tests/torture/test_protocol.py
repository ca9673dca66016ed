"""The save protocol on a simulated disk, in short; and that disk beside a real one."""

import errno
import os
import random

import protocol
import pytest
from disk import SimulatedDisk
from rows import Row

from qloop.storage.filesystem import FileSystem

CALLS = (
    *("make_folder", "create", "append", "sync", "sync_folder", "rename", "delete_file"),
    *("delete_folder", "list", "is_folder", "measure_file", "read"),
)


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.attack.split(" (")[0]: row for row in protocol.run(None, is_short=True)}


@pytest.mark.parametrize("number", range(5))
def test_every_promise_holds_at_every_call(rows, number):
    row = list(rows.values())[number]
    assert row.trials >= 10
    assert row.survived == row.trials, row.first_failure


def test_two_runs_of_a_trial_are_the_same():
    found = []
    for _ in range(2):
        disk = SimulatedDisk(protocol.ROOT)
        protocol.work(protocol.Saver(protocol.ROOT, disk), [])
        disk.lose_power(random.Random("x"))
        found.append([(name, disk.list(protocol.ROOT / name)) for name in disk.list(protocol.ROOT)])
        found[-1] = [(name.rsplit("-", 1)[0], files) for name, files in found[-1]]
    assert found[0] == found[1]


def do(disk: FileSystem, root, rng: random.Random) -> list:
    """Makes random calls on a disk, right and wrong ones, and notes every answer."""
    paths = [root / name for name in ("a", "b", "a/c", "a/d", "b/c")]
    answers, opened = [], []

    def call(name: str, *values) -> None:
        try:
            answer = getattr(disk, name)(*values)
            if name == "create":
                opened.append(answer)
                answer = None
            answers.append((name, b"".join(answer) if name == "read" else answer))
        except OSError as error:
            number = errno.ENOTEMPTY if error.errno == errno.EEXIST else error.errno
            answers.append((name, errno.errorcode[number or 0]))

    for _ in range(60):
        path = rng.choice(paths)
        name = rng.choice(CALLS)
        if name in ("append", "sync"):
            if opened:
                call(name, rng.choice(opened), *[memoryview(b"xyz")] * (name == "append"))
        elif name == "rename":
            call(name, path, path.with_name(rng.choice("abcd")))
        else:
            call(name, path)
    for descriptor in opened:
        disk.close(descriptor)
    return answers


@pytest.mark.parametrize("seed", range(30))
def test_the_simulated_disk_answers_as_a_real_one(tmp_path, seed):
    simulated = do(SimulatedDisk(tmp_path), tmp_path, random.Random(seed))
    real = do(FileSystem(), tmp_path, random.Random(seed))
    assert simulated == real
    assert len(os.listdir(tmp_path)) <= 4


def test_only_what_was_synced_is_sure_to_survive():
    """A file's bytes need its own sync and its name the folder's; with both, nothing can go."""
    survivors = set()
    for seed in range(40):
        disk = SimulatedDisk(protocol.ROOT)
        for name, syncs_file, syncs_name in (("a", 1, 1), ("b", 1, 0), ("c", 0, 1)):
            descriptor = disk.create(protocol.ROOT / name)
            disk.append(descriptor, memoryview(b"content"))
            if syncs_file:
                disk.sync(descriptor)
            if syncs_name:
                disk.sync_folder(protocol.ROOT)
        disk.lose_power(random.Random(seed))
        for name in "abc":
            file = protocol.ROOT / name
            found = b"".join(disk.read(file)) if disk.measure_file(file) is not None else None
            survivors.add((name, found))
    assert {found for name, found in survivors if name == "a"} == {b"content"}
    assert {found for name, found in survivors if name == "b"} == {b"content"}, "synced by c's"
    assert len({found for name, found in survivors if name == "c"}) > 3
