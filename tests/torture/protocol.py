"""The order of a save, tried out at every call on a simulated disk.

A training saves six checkpoints with rotation. It is stopped at a call: by kill -9, by a loss of
power, by a full disk, by an I/O error, or several of them in a row. Then a new process looks at the
disk, and the promises of `Promise` must hold. Variants of the protocol that break one of its rules
must be caught by the same trials.

python tests/torture/protocol.py            everything, about a minute
python tests/torture/protocol.py --short    a few hundred trials of each kind
"""

import argparse
import contextlib
import enum
import errno
import functools
import hashlib
import itertools
import random
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from disk import Crash, SimulatedDisk, Tree
from rows import Row, print_rows

from qloop.checkpoint.store import CheckpointStore, DamagedError, File, Kept, Manifest

ROOT = Path("/run")
NAMES = ("model.safetensors", "optimizer.safetensors", "progress.json")
SAVES = 6
LAST_STEP = 990
LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.5, 60: 0.5}
CHECKPOINT = re.compile(r"(damaged-)?checkpoint-(\d+)(-\d+)?")
PROMISE = "newest returned save found, byte for byte; two good ones kept; next save works"


class Promise(enum.Enum):
    """What holds on the disk after any trial."""

    WRONG = "only what was saved is accepted, byte for byte"
    OLD = "the newest save that returned is found, or a newer one"
    FEW = "two good checkpoints remain once two saves returned"
    KEPT = "a rotation leaves just what it is to keep"
    UNTOUCHED = "a refused save changes no older checkpoint"
    ASIDE = "nothing is moved aside but what was damaged or not readable"
    GONE = "what cannot be read is moved aside as it is"
    NEXT = "the next search and the next save work"
    CLEAN = "nothing unfinished is left"


class ViolationError(AssertionError):
    """A promise did not hold."""

    def __init__(self, promise: Promise, what: str) -> None:
        super().__init__(f"not so: {promise.value}: {what}")
        self.promise = promise


class Rules(NamedTuple):
    """What a rotation keeps."""

    keep: int
    keep_every: int
    keep_best: bool


class Variant(NamedTuple):
    """A protocol on a disk; both may be broken on purpose."""

    store_type: type[CheckpointStore] = CheckpointStore
    disk_type: type[SimulatedDisk] = SimulatedDisk


RULES = tuple(Rules(2, every, best) for every in (0, 30) for best in (False, True))
REAL = Variant()


@functools.cache
def files_of(step: int, life: int) -> dict[str, bytes]:
    """Gives the files of a step; every life of a training writes others, so that none can mix."""
    rng = random.Random(f"{step} {life}")
    return {name: rng.randbytes(rng.randrange(40, 200)) for name in NAMES}


def pieces_of(step: int, life: int) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Gives the files of a step in pieces, as the product does; one piece is empty."""
    for name, content in files_of(step, life).items():
        cuts = (0, 8, 8, len(content) // 2, len(content))
        yield name, (memoryview(content[a:b]) for a, b in itertools.pairwise(cuts))


def loss_of(step: int) -> float | None:
    return LOSSES.get(step, 1 + step / 7)


def step_of(name: str) -> int:
    match = CHECKPOINT.fullmatch(name)
    assert match, name
    return int(match[2])


class Training:
    """A training over one or more lives on one disk, and what it may rely on."""

    def __init__(self, variant: Variant, rules: Rules) -> None:
        self.store_type = variant.store_type
        self.disk = variant.disk_type(ROOT)
        self.rules = rules
        self.returned: list[int] = []
        self.life = 0

    def live(self, saves: int, goes_on: bool = False) -> None:
        """Resumes and saves; `goes_on` is training over saves that the disk refuses."""
        self.life += 1
        store = self.store_type(ROOT, self.disk)
        kept = store.find_newest(ignore)
        start = kept.manifest.step if kept else 0
        for step in range(start + 10, start + 10 * saves + 1, 10):
            before = self.disk.look(ROOT)
            try:
                store.write(step, pieces_of(step, self.life), {"loss": step / 7}, loss_of(step))
            except OSError as error:
                if not goes_on:
                    raise
                self._check_refused(before, error)
                continue
            self.returned.append(step)
            try:
                store.rotate(*self.rules, ignore)
            except OSError:
                if not goes_on:
                    raise

    def check(self, may_be_damaged: bool = False, may_be_unread: bool = False) -> None:
        """Looks at the disk as a new process does.

        Args:
            may_be_damaged: Power was lost, or bytes have rotted: what is not whole may be aside.
            may_be_unread: Reading failed for a while: what is whole may be aside.

        Raises:
            ViolationError: Of the first promise that did not hold.
        """
        self.disk.restart()
        found = self.check_search()
        aside = self._check_aside(may_be_damaged, may_be_unread)
        good = {step_of(name) for name in self.find_good("checkpoint-")}
        newest = max(self.returned[-1:], default=0)
        if found < newest and newest not in aside:
            raise ViolationError(Promise.OLD, f"{newest} had returned, found {found}")
        if len(good | aside) < min(2, len({*self.returned})):
            raise ViolationError(Promise.FEW, f"{good | aside} after {self.returned}")
        self._check_next_save(good)
        self._check_aside(may_be_damaged, may_be_unread)

    def check_search(self) -> int:
        """Finds the newest and compares it with what was saved; gives its step, 0 for none."""
        try:
            kept = self.store_type(ROOT, self.disk).find_newest(ignore)
        except OSError as error:
            raise ViolationError(Promise.NEXT, f"the search failed: {error}") from error
        if kept and not self._is_as_saved(self.disk.look(ROOT)[kept.path.name], kept.path.name):
            raise ViolationError(Promise.WRONG, f"{kept.path.name} is not what was saved")
        return kept.manifest.step if kept else 0

    def find_good(self, prefix: str) -> list[str]:
        """Names of the folders that are whole by the unbroken check, which must be right."""
        store = CheckpointStore(ROOT, self.disk)
        tree = self.disk.look(ROOT)
        good = [name for name in sorted(tree) if name.startswith(prefix) and is_good(store, name)]
        for name in good:
            if not self._is_as_saved(tree[name], name):
                raise ViolationError(Promise.WRONG, f"{name} is not what was saved")
        return good

    def _is_as_saved(self, found: Tree, name: str) -> bool:
        """Whether a folder holds the very bytes of its step in one life, not of two."""
        contents = {file: found.get(file) for file in NAMES}
        lives = range(1, self.life + 1)
        return any(contents == files_of(step_of(name), life) for life in lives)

    def _check_refused(self, before: Tree, error: OSError) -> None:
        after = self.disk.look(ROOT)
        for name, content in before.items():
            if CHECKPOINT.fullmatch(name) and after.get(name) != content:
                raise ViolationError(Promise.UNTOUCHED, name)
        if error.errno == errno.ENOSPC:
            self._check_clean()

    def _check_clean(self) -> None:
        left = [name for name in self.disk.look(ROOT) if name.startswith(".")]
        if left:
            raise ViolationError(Promise.CLEAN, ", ".join(left))

    def _check_aside(self, may_be_damaged: bool, may_be_unread: bool) -> set[int]:
        """Gives the steps of good ones that were moved aside."""
        good = self.find_good("damaged-")
        names = [name for name in self.disk.look(ROOT) if name.startswith("damaged-")]
        for name in names:
            if not (may_be_unread if name in good else may_be_damaged):
                state = "good" if name in good else "not whole"
                raise ViolationError(Promise.ASIDE, f"{name} is {state}")
        return {step_of(name) for name in good}

    def _check_next_save(self, good: set[int]) -> None:
        store = CheckpointStore(ROOT, self.disk)
        try:
            store.write(LAST_STEP, pieces_of(LAST_STEP, self.life), {}, loss_of(LAST_STEP))
            self._check_clean()
            store.rotate(*self.rules, ignore)
        except OSError as error:
            raise ViolationError(Promise.NEXT, str(error)) from error
        self._check_clean()
        expected = choose_kept({*good, LAST_STEP}, self.rules)
        found = {step_of(path.name) for path in store.list_checkpoints()}
        if found != expected:
            raise ViolationError(Promise.KEPT, f"{sorted(found)} instead of {sorted(expected)}")
        newest = CheckpointStore(ROOT, self.disk).find_newest(ignore)
        if newest is None or newest.manifest.step != LAST_STEP:
            raise ViolationError(Promise.NEXT, f"found {newest} instead of {LAST_STEP}")


def ignore(message: str) -> None:
    """Hears what is told of damage; the folders themselves are looked at."""


def is_good(store: CheckpointStore, name: str) -> bool:
    try:
        store.verify(ROOT / name)
    except DamagedError:
        return False
    return True


def choose_kept(steps: set[int], rules: Rules) -> set[int]:
    """Chooses what a rotation is to keep, by the words of its settings."""
    kept = set(sorted(steps)[-rules.keep :])
    if rules.keep_every:
        kept |= {step for step in steps if step % rules.keep_every == 0}
    measured = [step for step in sorted(steps, reverse=True) if loss_of(step) is not None]
    if rules.keep_best and measured:
        kept.add(min(measured, key=loss_of))
    return kept


@contextlib.contextmanager
def numbered_names() -> Iterator[None]:
    """Unfinished folders get numbers, not random names, so that a trial repeats itself."""
    numbers = itertools.count()

    def name_next() -> uuid.UUID:
        return uuid.UUID(int=next(numbers) << 96)

    with mock.patch.object(uuid, "uuid4", name_next):
        yield


class Course(NamedTuple):
    """What an undisturbed training does."""

    calls: list[str]
    changes: int


@functools.cache
def observe(variant: Variant, rules: Rules) -> Course:
    training = Training(variant, rules)
    training.live(SAVES)
    return Course(training.disk.calls, training.disk.changes)


# Trials. Each may be typed again as a failure names it.


@numbered_names()
def undisturbed(number: int, variant: Variant = REAL) -> None:
    """Nothing goes wrong."""
    training = Training(variant, RULES[number])
    training.live(SAVES)
    training.check()


@numbered_names()
def kill(change: int, number: int, variant: Variant = REAL) -> None:
    """Kills the process before a change; the system goes on and loses nothing that it was given."""
    training = Training(variant, RULES[number])
    training.disk.crash_before(change)
    with contextlib.suppress(Crash):
        training.live(SAVES)
    training.check()


@numbered_names()
def lose_power(change: int, seed: str, variant: Variant = REAL) -> None:
    """Loses power before a change; whatever was not synced survives at random."""
    rng = random.Random(seed)
    training = Training(variant, rng.choice(RULES))
    training.disk.crash_before(change)
    with contextlib.suppress(Crash):
        training.live(SAVES)
    training.disk.lose_power(rng)
    training.check(may_be_damaged=True)


@numbered_names()
def fill(seed: str, variant: Variant = REAL) -> None:
    """Fills the disk from a random call on, for a while; training goes on over refused saves."""
    rng = random.Random(seed)
    rules = rng.choice(RULES)
    training = Training(variant, rules)
    first = rng.randrange(len(observe(variant, rules).calls))
    last = first + rng.choice((1, 2, 5, 20, 60, 1000))
    training.disk.fill(first, last, is_late=rng.random() < 0.3)
    training.live(SAVES, goes_on=True)
    training.check()


@numbered_names()
def fail(call: int, lasts: int, is_resumed: bool, seed: str, variant: Variant = REAL) -> None:
    """Lets calls fail; training goes on over it, or is resumed for each save and so reads much.

    Half of the time the power is lost at the end, when all that counts must be on the disk.
    """
    rng = random.Random(seed)
    training = Training(variant, rng.choice(RULES))
    training.disk.fail_call(call, lasts=lasts)
    if is_resumed:
        for _ in range(SAVES):
            with contextlib.suppress(OSError):
                training.live(1)
    else:
        with contextlib.suppress(OSError):  # of the search; that is the end of such a run
            training.live(SAVES, goes_on=True)
    loses_power = rng.random() < 0.5
    if loses_power:
        training.disk.lose_power(rng)
    training.check(may_be_damaged=loses_power, may_be_unread=True)


@numbered_names()
def fail_search(call: int, lasts: int, names: tuple[str, ...], variant: Variant = REAL) -> None:
    """Lets calls of a search fail; what it cannot read is moved aside, and nothing is lost."""
    training = Training(variant, RULES[0])
    training.live(SAVES)
    before = list_contents(training.disk)
    training.disk.restart()
    training.disk.fail_call(len(training.disk.calls) + call, lasts=lasts, names=names)
    with contextlib.suppress(OSError):
        training.store_type(ROOT, training.disk).find_newest(ignore)
    training.disk.restart()
    if list_contents(training.disk) != before:
        raise ViolationError(Promise.GONE, ", ".join(training.disk.look(ROOT)))
    aside = [name for name in training.disk.look(ROOT) if name.startswith("damaged-")]
    if lasts == 1 and len(aside) > 1:
        raise ViolationError(Promise.ASIDE, f"{aside} after one error")
    training.check(may_be_unread=True)


@numbered_names()
def live_often(seed: str, variant: Variant = REAL) -> None:
    """Lets a training end again and again, at once or late, each time in another way."""
    rng = random.Random(seed)
    training = Training(variant, rng.choice(RULES))
    has_lost_power = False
    for _ in range(rng.randrange(2, 6)):
        way = rng.choice(("kill", "power", "full"))
        disk = training.disk
        if way == "full":
            first = len(disk.calls) + rng.randrange(60)
            disk.fill(first, first + rng.choice((1, 5, 40)), is_late=rng.random() < 0.3)
        else:
            disk.crash_before(disk.changes + rng.randrange(rng.choice((10, 90))))
        with contextlib.suppress(Crash):
            training.live(rng.randrange(1, 4), goes_on=True)
        disk.restart()
        if way == "power":
            disk.lose_power(rng)
            has_lost_power = True
    training.check(may_be_damaged=has_lost_power)


@numbered_names()
def rot(seed: str, variant: Variant = REAL) -> None:
    """Flips bits of one or two checkpoints; after the next save as many good ones stay as before.

    Keeps three, so that a rotation meets one that the search for the newest did not look at.
    """
    rng = random.Random(seed)
    training = Training(variant, Rules(3, rng.choice((0, 30)), rng.random() < 0.5))
    training.live(SAVES)
    names = [path.name for path in CheckpointStore(ROOT, training.disk).list_checkpoints()]
    rotten = rng.sample(names, rng.randrange(1, 3))
    for name in rotten:
        file = rng.choice((*NAMES, "manifest.json", "COMMIT"))
        training.disk.flip_bit(ROOT / name / file, rng)
    training.returned = [step_of(name) for name in names if name not in rotten]
    training.check_search()
    training.live(1)
    good = {step_of(name) for name in training.find_good("checkpoint-")}
    expected = choose_kept({*training.returned}, training.rules)
    if not expected <= good:
        raise ViolationError(Promise.KEPT, f"{sorted(good)} instead of {sorted(expected)}")
    training.check(may_be_damaged=True)


def attack(seed: str, variant: Variant = REAL) -> None:
    """One of the trials above, at random."""
    rng = random.Random(seed)
    number = rng.randrange(len(RULES))
    course = observe(variant, RULES[number])
    call, change = rng.randrange(len(course.calls)), rng.randrange(course.changes)
    if rng.random() < 0.5:  # its failure forgets more than that of any other call
        call = rng.choice([n for n, name in enumerate(course.calls) if name == "sync"])
    trials = (
        functools.partial(kill, change, number),
        functools.partial(lose_power, change, seed),
        functools.partial(fill, seed),
        functools.partial(fail, call, 1, rng.random() < 0.5, seed),
        functools.partial(fail_search, rng.randrange(30), 1, ()),
        functools.partial(live_often, seed),
        functools.partial(rot, seed),
    )
    rng.choice(trials)(variant=variant)


def list_contents(disk: SimulatedDisk) -> list[Tree]:
    """Gives what all the folders of a disk hold, under whatever names."""
    return sorted(disk.look(ROOT).values(), key=repr)


# Rows


Trial = tuple[Callable[..., None], tuple]


def judge(what: str, trials: Iterable[Trial], note: str = "") -> Row:
    """Runs trials and counts those in which every promise held."""
    count = survived = 0
    first_failure = ""
    for trial, arguments in trials:
        count += 1
        try:
            trial(*arguments)
            survived += 1
        except ViolationError as violation:
            typed = f"protocol.{trial.__name__}({', '.join(map(repr, arguments))})"
            first_failure = first_failure or f"{typed}: {violation}"
    return Row(what, count, survived, PROMISE, note, first_failure=first_failure)


def run_kills() -> Row:
    """Kills before every single change, under all rules of rotation."""
    trials = [
        (kill, (change, number))
        for number, rules in enumerate(RULES)
        for change in range(observe(REAL, rules).changes + 1)
    ]
    return judge(
        "kill -9 before every call that changes the disk (simulated)",
        trials,
        f"exhaustive, under {len(RULES)} rules of rotation",
    )


def run_power_losses(survivals: int, seed: int) -> Row:
    """Loses power before every change, several times with other survivors."""
    changes = max(observe(REAL, rules).changes for rules in RULES) + 1
    trials = (
        (lose_power, (number // survivals, f"{seed}-{number}"))
        for number in range(changes * survivals)
    )
    return judge("loss of power at every call (simulated)", trials, f"{survivals} survivals a call")


def run_full_disks(trials: int, seed: int) -> Row:
    """Fills the disk at random times."""
    return judge("disk full for a while (simulated)", name_trials(fill, trials, seed))


def run_lives(trials: int, seed: int) -> Row:
    """Ends a training several times."""
    return judge(
        "several ends in a row: kill -9, loss of power, full disk (simulated)",
        name_trials(live_often, trials, seed),
        "so also within the recovery from the one before",
    )


def run_rot(trials: int, seed: int) -> Row:
    """Changes bits of some checkpoints."""
    return judge("bits of some checkpoints flipped (simulated)", name_trials(rot, trials, seed))


def run_io_errors(lengths: Iterable[int], seed: int) -> Row:
    """Fails every call for so many calls, in a training and in a search."""
    calls = max(len(observe(REAL, rules).calls) for rules in RULES)
    failing = itertools.product(range(calls), lengths, (False, True))
    numbered = enumerate(failing)
    trials = [(fail, (*how, f"{seed}-{number}")) for number, how in numbered]
    searching = itertools.product(range(measure_search()), (1, 10_000), ((), ("read",)))
    trials += [(fail_search, how) for how in searching]
    return judge(
        "I/O error at every call, once or from then on (simulated)",
        trials,
        "where reading fails, the older one is taken, and nothing is deleted",
    )


def measure_search() -> int:
    """Counts the calls of a search that finds nothing readable."""
    training = Training(REAL, RULES[0])
    training.live(SAVES)
    before = len(training.disk.calls)
    training.disk.fail_call(before, lasts=10_000, names=("read",))
    CheckpointStore(ROOT, training.disk).find_newest(ignore)
    return len(training.disk.calls) - before


def name_trials(trial: Callable[..., None], count: int, seed: int) -> Iterator[Trial]:
    return ((trial, (f"{seed}-{number}",)) for number in range(count))


# Variants that break one rule each


class NoFileSync(SimulatedDisk):
    def sync(self, descriptor: int) -> None:
        self._begin("sync")


class NoFolderSync(SimulatedDisk):
    """Syncs the parent, and no folder of files."""

    def sync_folder(self, path: Path) -> None:
        if path == ROOT:
            super().sync_folder(path)


class NoParentSync(SimulatedDisk):
    def sync_folder(self, path: Path) -> None:
        if path != ROOT:
            super().sync_folder(path)


class ShortWrites(SimulatedDisk):
    """Takes what fitted for all that there was, as a write without a loop does."""

    def append(self, descriptor: int, data: memoryview) -> None:
        with contextlib.suppress(OSError):
            super().append(descriptor, data)


class SyncsAgain(SimulatedDisk):
    """Syncs once more after an error, and believes the second answer."""

    def sync(self, descriptor: int) -> None:
        try:
            super().sync(descriptor)
        except OSError:
            super().sync(descriptor)


class Reordered(CheckpointStore):
    """Saves in the order of `phases`; with these it is the protocol itself."""

    phases = ("files", "seal", "name")

    def write(self, step: int, files: Any, facts: Any, held_out_loss: Any = None) -> Kept:
        contents = {name: b"".join(pieces) for name, pieces in files}
        listed = {
            name: File(len(content), hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        }
        kept = Kept(
            self.folder / f"checkpoint-{step}", Manifest(step, held_out_loss, dict(facts), listed)
        )
        self._where = self.folder / f".unfinished-{kept.path.name}"
        self.delete_unfinished()
        try:
            self._disk.make_folder(self._where)
            for phase in self.phases:
                getattr(self, f"_do_{phase}")(kept, contents)
        except OSError:
            self._try_to_delete(self._where)
            raise
        return kept

    def _do_files(self, kept: Kept, contents: Mapping[str, bytes]) -> None:
        for name, content in contents.items():
            self._write_file(self._where / name, [memoryview(content)])

    def _do_seal(self, kept: Kept, contents: Mapping[str, bytes]) -> None:
        self._seal(self._where, kept.manifest)

    def _do_sync(self, kept: Kept, contents: Mapping[str, bytes]) -> None:
        self._disk.sync_folder(self._where)

    def _do_name(self, kept: Kept, contents: Mapping[str, bytes]) -> None:
        self._disk.rename(self._where, kept.path)
        self._where = kept.path
        self._disk.sync_folder(self.folder)

    def _do_room(self, kept: Kept, contents: Mapping[str, bytes]) -> None:
        for path in self.list_checkpoints()[:-1]:
            self._delete(path)


class DeletesFirst(Reordered):
    phases = ("room", "files", "seal", "name")


class DeletesBeforeName(Reordered):
    phases = ("files", "seal", "room", "name")


class NamesFirst(Reordered):
    phases = ("name", "files", "seal")


class SealsLast(Reordered):
    phases = ("files", "name", "seal")


class ManifestFirst(Reordered):
    phases = ("seal", "files", "name")


class ManifestFirstThenSync(Reordered):
    phases = ("seal", "files", "sync", "name")


class ManifestFirstInPlace(Reordered):
    phases = ("name", "seal", "files")


class StopsAtDamage(NamesFirst):
    """Writes in place, and takes it for granted that what has the name can be read."""

    def find_newest(self, tell: Any) -> Kept | None:
        for path in reversed(self.list_checkpoints()):
            b"".join(self._disk.read(path / "COMMIT"))
            return Kept(path, self.verify(path))
        return None


class MakesRoom(CheckpointStore):
    """Deletes the oldest when the disk refuses the newest."""

    def write(self, step: int, files: Any, facts: Any, held_out_loss: Any = None) -> Kept:
        try:
            return super().write(step, files, facts, held_out_loss)
        except OSError:
            for path in self.list_checkpoints()[:1]:
                self._delete(path)
            raise


class NoVerification(CheckpointStore):
    """Believes a manifest that it can read."""

    def verify(self, path: Path, with_hashes: bool = True) -> Manifest:
        return self._read_manifest(path)


class SizesOnly(CheckpointStore):
    def verify(self, path: Path, with_hashes: bool = True) -> Manifest:
        return super().verify(path, with_hashes=False)


class CountsUnverified(CheckpointStore):
    """Rotates by name alone: a damaged one takes the place of a good one."""

    def rotate(self, keep: int, keep_every: int, keep_best: bool, tell: Any) -> None:
        paths = self.list_checkpoints()
        kept = choose_kept(
            {step_of(path.name) for path in paths}, Rules(keep, keep_every, keep_best)
        )
        for path in paths:
            if step_of(path.name) not in kept:
                self._delete(path)


class DeletesUnreadable(CheckpointStore):
    """Deletes what it cannot read, where the product moves it aside."""

    def set_aside(self, path: Path) -> Path:
        self._delete(path)
        return path


class LeavesRefused(CheckpointStore):
    def _try_to_delete(self, path: Path) -> None:
        """Leaves it to a person to delete what a refused save has written."""


class DeletesUnderItsName(CheckpointStore):
    """Deletes a checkpoint file by file while it has its name."""

    def _delete(self, path: Path) -> None:
        self._delete_tree(path)


class NoSyncOfDeletion(CheckpointStore):
    """Deletes the files of a checkpoint before the loss of its name is on the disk."""

    def _delete(self, path: Path) -> None:
        deleted = self.folder / f".deleted-{path.name}"
        self._verified.pop(path, None)
        self._disk.rename(path, deleted)
        self._delete_tree(deleted)


class NoSyncOfMove(CheckpointStore):
    """Moves a damaged one aside, and does not wait until that is on the disk."""

    def set_aside(self, path: Path) -> Path:
        aside = self.folder / f"damaged-{path.name}"
        self._disk.rename(path, aside)
        self._verified.pop(path, None)
        return aside


class Harm(NamedTuple):
    """A variant, and which promise must be seen to break: any of these."""

    variant: Variant
    promises: tuple[Promise, ...]


LOSS = (Promise.OLD, Promise.FEW)
HARMFUL: dict[str, Harm] = {
    "deletes before it saves": Harm(Variant(DeletesFirst), LOSS),
    "deletes before the new one has its name": Harm(Variant(DeletesBeforeName), LOSS),
    "syncs no file": Harm(Variant(disk_type=NoFileSync), LOSS),
    "syncs no folder of files": Harm(Variant(disk_type=NoFolderSync), LOSS),
    "syncs no parent folder": Harm(Variant(disk_type=NoParentSync), LOSS),
    "syncs again after a failed sync": Harm(Variant(disk_type=SyncsAgain), LOSS),
    "takes a short write for a whole one": Harm(Variant(disk_type=ShortWrites), LOSS),
    "seals before it writes": Harm(Variant(ManifestFirst), LOSS),
    "seals before it writes, in place": Harm(Variant(ManifestFirstInPlace), LOSS),
    "writes in place": Harm(Variant(NamesFirst), (Promise.ASIDE,)),
    "writes in place, reads without a doubt": Harm(Variant(StopsAtDamage), (Promise.NEXT,)),
    "deletes the oldest when the disk refuses": Harm(Variant(MakesRoom), (Promise.UNTOUCHED,)),
    "gives the name before the seal": Harm(Variant(SealsLast), (Promise.ASIDE,)),
    "verifies nothing": Harm(Variant(NoVerification), (Promise.WRONG,)),
    "verifies nothing, syncs no file": Harm(Variant(NoVerification, NoFileSync), (Promise.WRONG,)),
    "compares sizes only": Harm(Variant(SizesOnly), (Promise.WRONG,)),
    "compares sizes only, syncs no file": Harm(Variant(SizesOnly, NoFileSync), (Promise.WRONG,)),
    "counts damaged ones as kept": Harm(Variant(CountsUnverified), (Promise.KEPT,)),
    "deletes what it cannot read": Harm(Variant(DeletesUnreadable), (Promise.GONE,)),
    "deletes under the checkpoint's name": Harm(Variant(DeletesUnderItsName), (Promise.ASIDE,)),
    "leaves a refused save lying": Harm(Variant(LeavesRefused), (Promise.CLEAN,)),
}
# Without harm, since another rule covers for the broken one.
HARMLESS: dict[str, tuple[Variant, str]] = {
    "seals before it writes, syncs all before the name": (
        Variant(ManifestFirstThenSync),
        "nobody looks before the name",
    ),
    "deletes before the loss of the name is synced": (
        Variant(NoSyncOfDeletion),
        "what comes back is found damaged, and newer ones are good",
    ),
    "moves aside without a sync": (Variant(NoSyncOfMove), "what comes back is found again"),
}


class Catch(NamedTuple):
    """How a variant was noticed."""

    seed: str
    trials: int
    promise: Promise


def catch(
    variant: Variant, trials: int, seed: int, promises: Iterable[Promise] = Promise
) -> Catch | None:
    """Tries a variant until one of these promises breaks."""
    for number in range(trials):
        try:
            attack(f"{seed}-{number}", variant)
        except ViolationError as violation:
            if violation.promise in promises:
                return Catch(f"{seed}-{number}", number + 1, violation.promise)
    return None


def works_undisturbed(variant: Variant) -> bool:
    """Whether it saves and rotates where nothing goes wrong; else its catch would prove nothing."""
    try:
        for number in range(len(RULES)):
            undisturbed(number, variant)
    except ViolationError:
        return False
    return True


def run_mutants(trials: int, seed: int, calm_trials: int | None = None) -> Row:
    """Breaks one rule at a time; the trials must notice, and see nothing where none is broken.

    Args:
        trials: At most so many for a harmful variant.
        seed: Of the trials.
        calm_trials: So many for the protocol itself and each harmless variant; None: as many.
    """
    caught = {
        name: catch(variant, trials, seed, promises)
        for name, (variant, promises) in HARMFUL.items()
    }
    calm = {"the protocol itself": REAL, "the protocol, taken apart": Variant(Reordered)}
    calm |= {name: variant for name, (variant, _) in HARMLESS.items()}
    seen = {name: catch(variant, calm_trials or trials, seed) for name, variant in calm.items()}
    variants = {name: harm.variant for name, harm in HARMFUL.items()} | calm
    wrong = [
        *(f"{name}: not noticed" for name, how in caught.items() if not how),
        *(f"{name}: protocol.attack('{how.seed}')" for name, how in seen.items() if how),
        *(
            f"{name}: not even undisturbed"
            for name, v in variants.items()
            if not works_undisturbed(v)
        ),
    ]
    covered = [f"{name} ({why})" for name, (_, why) in HARMLESS.items()]
    return Row(
        "harmful variants of the protocol, under the same trials",
        len(HARMFUL),
        max(0, len(HARMFUL) - len(wrong)),
        "every one is caught, the unbroken one never",
        f"{describe(caught)}; not harmful, since another rule covers for it: {', '.join(covered)}",
        first_failure="; ".join(wrong),
    )


def describe(caught: Mapping[str, Catch | None]) -> str:
    """Says which promise each variant broke, and in which trial."""
    found: dict[Promise, list[str]] = {}
    for name, how in caught.items():
        if how:
            found.setdefault(how.promise, []).append(f"{name} ({how.trials})")
    return "; ".join(
        f"broke '{promise.value}' in trial: {', '.join(names)}" for promise, names in found.items()
    )


def run(workspace: object, is_short: bool) -> list[Row]:
    """Runs all of it; short: a few hundred trials each, kills exhaustively in any case.

    Args:
        workspace: For suites that make real runs; not used here.
        is_short: Whether it must be quick.
    """
    return [
        run_kills(),
        run_power_losses(2 if is_short else 60, seed=1),
        run_full_disks(300 if is_short else 3000, seed=2),
        run_io_errors([1] if is_short else [1, 2, 10, 10_000], seed=4),
        run_lives(200 if is_short else 3000, seed=5),
        run_rot(100 if is_short else 1000, seed=6),
        run_mutants(2000, seed=3, calm_trials=60 if is_short else None),
    ]


def main() -> None:
    """Shows the rows; fails if a promise did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few hundred trials of each kind")
    started = time.monotonic()
    rows = run(None, parser.parse_args().short)
    print_rows(rows)
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(any(row.survived < row.trials for row in rows))


if __name__ == "__main__":
    main()
