"""The save protocol on a simulated disk, in short; and that disk beside a real one."""

import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import protocol
import pytest
from disk import CHANGES, PIECE_BYTES, TAKES_SPACE, Crash, SimulatedDisk
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import ROOT, Promise, Variant, ViolationError
from rows import Row

from qloop.checkpoint.filesystem import FileSystem

PATHS = ("a", "b", "a/c", "a/d", "b/c", "a/c/e")
ON_PATHS = (
    *("make_folder", "create", "sync_folder", "delete_file", "delete_folder"),
    *("list", "is_folder", "measure_file", "read", "count_free_bytes"),
)
Step = tuple


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return protocol.run(None, is_short=True)


@pytest.mark.parametrize("number", range(7))
def test_every_promise_holds_at_every_call(rows, number):
    row = rows[number]
    assert row.trials >= 10
    assert row.survived == row.trials, row.first_failure


def test_kills_are_tried_before_every_call(rows):
    changes = [protocol.observe(protocol.REAL, rules).changes for rules in protocol.RULES]
    assert rows[0].trials == sum(changes) + len(changes)
    assert min(changes) > 100


def test_every_promise_is_one_that_some_variant_breaks():
    assert {promise for harm in protocol.HARMFUL.values() for promise in harm.promises} == {
        *protocol.Promise
    }


@pytest.mark.parametrize("store_type", [protocol.NoVerification, protocol.SizesOnly])
def test_power_losses_alone_show_who_accepts_what_was_not_synced(store_type):
    variant = Variant(store_type, protocol.NoFileSync)
    assert Promise.WRONG in find_broken(variant, trials=2000)


def find_broken(variant: Variant, trials: int) -> Iterator[Promise]:
    """Yields what breaks at losses of power."""
    for number in range(trials):
        try:
            protocol.lose_power(40 + number % 150, f"7-{number}", variant)
        except ViolationError as violation:
            yield violation.promise


def test_a_violation_is_counted_and_named_so_that_it_can_be_typed_again():
    broken = Variant(protocol.NamesFirst)
    row = protocol.judge("x", [(protocol.undisturbed, (0,)), (protocol.kill, (5, 0, broken))])
    assert (row.trials, row.survived) == (2, 1)
    assert row.first_failure.startswith("protocol.kill(5, 0, ")
    assert Promise.ASIDE.value in row.first_failure


def test_a_trial_repeats_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(
        protocol.Training, "check", lambda self, **_: seen.append(self.disk.look(ROOT))
    )
    for _ in range(2):
        protocol.live_often("11-4")
    assert seen[0] == seen[1]


# The simulated disk beside a real one


def do(disk: FileSystem, root: Path, steps: list[Step]) -> list:
    """Makes calls on a disk, right and wrong ones, and notes every answer and error."""
    answers, opened = [], []

    def ask(name: str, *values) -> object:
        answer = getattr(disk, name)(*values)
        if name == "create":
            opened.append(answer)
        if name in ("create", "count_free_bytes"):
            return type(answer)
        return b"".join(answer) if name == "read" else answer

    for name, first, second in steps:
        values = (root / first,)
        if name == "rename":
            values = (root / first, root / second)
        elif name in ("append", "sync"):
            if not opened:
                continue
            descriptor = opened[len(second) % len(opened)]
            values = (descriptor, memoryview(first.encode())) if name == "append" else (descriptor,)
        try:
            answers.append((name, ask(name, *values)))
        except OSError as error:
            # POSIX lets a disk say either of a folder that is not empty.
            number = errno.ENOTEMPTY if error.errno == errno.EEXIST else error.errno
            is_same_class = type(error) is type(OSError(error.errno, ""))
            answers.append((name, errno.errorcode[number or 0], is_same_class))
    for descriptor in opened:
        disk.close(descriptor)
    return answers + list_all(disk, root)


def list_all(disk: FileSystem, folder: Path) -> list:
    """Gives every name below a folder, and every file's bytes, as the disk tells them."""
    found = []
    for name in disk.list(folder):
        path = folder / name
        is_folder = disk.is_folder(path)
        found.append((name, None if is_folder else b"".join(disk.read(path))))
        found += list_all(disk, path) if is_folder else []
    return found


def compare(steps: list[Step]) -> list:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        real = do(FileSystem(), root, steps)
        assert do(SimulatedDisk(root), root, steps) == real
    return real


names = st.sampled_from((*ON_PATHS, "append", "sync", "rename", "make_folder", "create", "rename"))
paths = st.sampled_from(PATHS)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(names, paths, paths), min_size=5, max_size=40))
def test_the_simulated_disk_answers_as_a_real_one(steps):
    compare(steps)


TREE = [("make_folder", "a", ""), ("make_folder", "b", ""), ("create", "a/c", ""),
        ("append", "some", "")]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "first", "second", "error"),
    [
        ("make_folder", "a", "", "ENOTEMPTY"),  # EEXIST, see `do`
        ("make_folder", "z/c", "", "ENOENT"),
        ("make_folder", "a/c/e", "", "ENOTDIR"),
        ("create", "a/c", "", "ENOTEMPTY"),
        ("create", "a", "", "ENOTEMPTY"),
        ("create", "z/c", "", "ENOENT"),
        ("sync_folder", "z", "", "ENOENT"),
        ("sync_folder", "a/c", "", "ENOTDIR"),
        ("delete_file", "z", "", "ENOENT"),
        ("delete_file", "b", "", "EISDIR"),
        ("delete_folder", "z", "", "ENOENT"),
        ("delete_folder", "a", "", "ENOTEMPTY"),
        ("delete_folder", "a/c", "", "ENOTDIR"),
        ("rename", "z", "y", "ENOENT"),
        ("rename", "a", "z/a", "ENOENT"),
        ("rename", "b", "a", "ENOTEMPTY"),
        ("rename", "a", "a/e", "EINVAL"),
        ("rename", "a/c", "a", "ENOTEMPTY"),
        ("rename", "b", "a/c", "ENOTDIR"),
        ("rename", "a/c", "b", "EISDIR"),
        ("read", "z", "", "ENOENT"),
        ("read", "b", "", "EISDIR"),
        ("read", "a/c/e", "", "ENOTDIR"),
        ("count_free_bytes", "z", "", "ENOENT"),
    ],
)
def test_both_disks_refuse_alike(name, first, second, error):
    assert compare([*TREE, (name, first, second)])[len(TREE)] == (name, error, True)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("rename", "a", "b"),  # over an empty folder, once a is empty
        ("rename", "a/c", "b/c"),
        ("rename", "a/c", "a/c"),
        ("rename", "a", "a"),
        ("list", "z", ""),
        ("list", "a/c", ""),
        ("measure_file", "a", ""),
        ("measure_file", "z", ""),
        ("is_folder", "a/c/e", ""),
    ],
)
def test_both_disks_allow_alike(name, first, second):
    steps = [*TREE, ("delete_file", "a/c", "")] if second == "b" else TREE
    answer = compare([*steps, (name, first, second)])[len(steps)]
    assert answer[0] == name
    assert len(answer) == 2, answer


@pytest.mark.parametrize("is_real", [False, True])
def test_a_closed_descriptor_is_refused(tmp_path, is_real):
    disk = FileSystem() if is_real else SimulatedDisk(tmp_path)
    descriptor = disk.create(tmp_path / "a")
    disk.close(descriptor)
    for call in (
        lambda: disk.append(descriptor, memoryview(b"x")),
        lambda: disk.sync(descriptor),
        lambda: disk.close(descriptor),
    ):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            call()


def test_every_call_of_a_file_system_is_simulated():
    calls = {name for name in vars(FileSystem) if not name.startswith("_")}
    assert calls <= vars(SimulatedDisk).keys()
    assert calls == {*ON_PATHS, *CHANGES}


# What the simulated disk does to those who trust it


def make_file(disk: SimulatedDisk, name: str, content: bytes, is_synced: bool = True) -> None:
    descriptor = disk.create(ROOT / name)
    disk.append(descriptor, memoryview(content))
    if is_synced:
        disk.sync(descriptor)
    disk.close(descriptor)


def collect_survivors(prepare, seeds: int = 60) -> set:
    """Gives what is found at the root after many losses of power, each on a disk of its own."""
    found = set()
    for seed in range(seeds):
        disk = SimulatedDisk(ROOT)
        prepare(disk)
        disk.lose_power(random.Random(seed))
        found.add(tuple(list_all(disk, ROOT)))
    return found


def test_what_was_synced_with_its_name_survives():
    def prepare(disk):
        make_file(disk, "a", b"content")
        disk.sync_folder(ROOT)

    assert collect_survivors(prepare) == {(("a", b"content"),)}


def test_a_synced_file_may_have_no_name():
    assert collect_survivors(lambda disk: make_file(disk, "a", b"content")) == {
        (),
        (("a", b"content"),),
    }


def test_bytes_that_were_not_synced_may_be_anything_of_their_length_or_less():
    def prepare(disk):
        make_file(disk, "a", b"content", is_synced=False)
        disk.sync_folder(ROOT)

    found = {content for ((_, content),) in collect_survivors(prepare)}
    assert {b"content", b"", bytes(7)} < found
    assert any(b"content".startswith(c) and 0 < len(c) < 7 for c in found), "cut"
    assert any(len(c) == 7 and c[:1] == b"c" and c != b"content" for c in found), "partly old"
    assert max(map(len, found)) == 7


def test_synced_bytes_stay_when_later_ones_are_lost():
    def prepare(disk):
        descriptor = disk.create(ROOT / "a")
        disk.append(descriptor, memoryview(b"first"))
        disk.sync(descriptor)
        disk.append(descriptor, memoryview(b"second"))
        disk.sync_folder(ROOT)

    found = {content for ((_, content),) in collect_survivors(prepare)}
    assert all(content.startswith(b"first") for content in found)
    assert {b"first", b"firstsecond"} < found


@pytest.mark.parametrize("target", ["b", "d/b"])
def test_a_rename_happened_or_did_not(target):
    def prepare(disk):
        disk.make_folder(ROOT / "d")
        make_file(disk, "a", b"x")
        disk.sync_folder(ROOT)
        disk.rename(ROOT / "a", ROOT / target)

    after = {"b": (("b", b"x"), ("d", None)), "d/b": (("d", None), ("b", b"x"))}[target]
    assert collect_survivors(prepare) == {(("a", b"x"), ("d", None)), after}


def test_changes_of_names_survive_each_on_its_own():
    def prepare(disk):
        make_file(disk, "a", b"x")
        disk.sync_folder(ROOT)
        disk.delete_file(ROOT / "a")
        make_file(disk, "b", b"x")

    a, b = ("a", b"x"), ("b", b"x")
    assert collect_survivors(prepare) == {(), (a,), (b,), (a, b)}


def test_a_sync_that_failed_has_forgotten_the_bytes():
    def prepare(disk):
        descriptor = disk.create(ROOT / "a")
        disk.sync_folder(ROOT)
        disk.append(descriptor, memoryview(b"content"))
        disk.fail_call(len(disk.calls))
        with pytest.raises(OSError, match="Input/output"):
            disk.sync(descriptor)
        disk.sync(descriptor)

    assert (("a", b""),) in collect_survivors(prepare)


def test_a_kill_leaves_what_was_done_and_lets_nothing_more_be_done():
    disk = SimulatedDisk(ROOT)
    make_file(disk, "a", b"content")
    disk.crash_before(disk.changes + 1)
    opened = disk.create(ROOT / "b")
    with pytest.raises(Crash):
        disk.append(opened, memoryview(b"content"))
    with pytest.raises(Crash):
        disk.close(opened)
    with pytest.raises(Crash):
        disk.list(ROOT)
    disk.restart()
    assert list_all(disk, ROOT) == [("a", b"content"), ("b", b"")]


def error_of(call: Callable[[], object]) -> int:
    """Gives the number of the error that a call raises; 0 for none."""
    try:
        call()
    except OSError as error:
        return error.errno
    return 0


def test_calls_that_only_look_do_not_move_a_kill():
    disk = SimulatedDisk(ROOT)
    disk.crash_before(1)
    disk.make_folder(ROOT / "a")
    assert disk.list(ROOT) == ["a"]
    with pytest.raises(Crash):
        disk.make_folder(ROOT / "b")


@pytest.mark.parametrize("is_late", [False, True])
def test_a_full_disk_refuses_what_takes_space_and_nothing_else(is_late):
    disk = SimulatedDisk(ROOT)
    make_file(disk, "a", b"content")
    disk.make_folder(ROOT / "b")
    opened = disk.create(ROOT / "c")
    disk.fill(len(disk.calls), len(disk.calls) + 100, is_late)
    calls = {
        "make_folder": lambda: disk.make_folder(ROOT / "d"),
        "create": lambda: disk.create(ROOT / "e"),
        "append": lambda: disk.append(opened, memoryview(b"content")),
        "sync": lambda: disk.sync(opened),
        "sync_folder": lambda: disk.sync_folder(ROOT),
        "rename": lambda: disk.rename(ROOT / "a", ROOT / "f"),
        "close": lambda: disk.close(opened),
        "delete_file": lambda: disk.delete_file(ROOT / "c"),
        "delete_folder": lambda: disk.delete_folder(ROOT / "b"),
        "list": lambda: disk.list(ROOT),
    }
    errors = {name: error_of(call) for name, call in calls.items()}
    refused = {"sync", "sync_folder", "rename"} if is_late else TAKES_SPACE
    assert errors == {name: errno.ENOSPC if name in refused else 0 for name in calls}


def test_an_append_that_a_full_disk_refuses_may_have_written_a_part():
    left = set()
    for before in range(3):
        disk = SimulatedDisk(ROOT)
        opened = disk.create(ROOT / "a")
        for _ in range(before):
            disk.list(ROOT)
        disk.fill(len(disk.calls), len(disk.calls) + 1)
        with pytest.raises(OSError, match="No space"):
            disk.append(opened, memoryview(b"content"))
        left.add(b"".join(disk.read(ROOT / "a")))
        disk.append(opened, memoryview(b"more"))
    assert left == {b"", b"co", b"cont"}


@pytest.mark.parametrize(("lasts", "expected"), [(1, "-x--"), (2, "-xx-"), (100, "-xxx")])
def test_a_call_of_any_kind_fails_once_or_for_a_while(lasts, expected):
    disk = SimulatedDisk(ROOT)
    make_file(disk, "a", b"content")
    disk.fail_call(len(disk.calls) + 1, errno.EIO, lasts)
    errors = [
        error_of(lambda: disk.list(ROOT)),
        error_of(lambda: list(disk.read(ROOT / "a"))),
        error_of(lambda: disk.is_folder(ROOT)),
        error_of(lambda: disk.rename(ROOT / "a", ROOT / "b")),
    ]
    assert errors == [errno.EIO if sign == "x" else 0 for sign in expected]


def test_a_file_may_fail_in_its_middle():
    disk = SimulatedDisk(ROOT)
    content = random.Random(1).randbytes(3 * PIECE_BYTES)
    make_file(disk, "a", content)
    disk.fail_call(len(disk.calls) + 1)
    pieces = disk.read(ROOT / "a")
    assert next(pieces) == content[:PIECE_BYTES]
    with pytest.raises(OSError, match="Input/output"):
        next(pieces)


@pytest.mark.parametrize("is_real", [False, True])
def test_a_size_that_cannot_be_read_is_none(tmp_path, monkeypatch, is_real):
    """Both disks answer alike where the system refuses: that is what the trials rely on."""
    disk = FileSystem() if is_real else SimulatedDisk(tmp_path)
    os_error = OSError(errno.EIO, os.strerror(errno.EIO))
    disk.close(disk.create(tmp_path / "a"))
    assert disk.measure_file(tmp_path / "a") == 0

    def refuse(*_):
        raise os_error

    monkeypatch.setattr(Path, "lstat", refuse) if is_real else disk.fail_call(len(disk.calls))
    assert disk.measure_file(tmp_path / "a") is None
