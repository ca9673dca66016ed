"""The order of a save, tried out at every call on a simulated disk.

A workload saves six checkpoints and rotates before each, and after every second one, as the manager
does for background saves and for synchronous ones. It is stopped at a call: by kill -9, by a loss
of power, by a full disk, by an I/O error. Then a new process looks at the disk and must find:

- the newest step whose save had returned, or a newer one, with the very bytes of that step;
- two good checkpoints, once two saves had returned;
- nothing moved aside as damaged, unless the power was lost or reading itself failed;
- a disk on which the next save works and leaves nothing unfinished behind.

Variants of the protocol that break one of its rules must be caught by the same trials.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from disk import Crash, SimulatedDisk, crash_at, failing_between, full_between
from rows import Row
from workspace import Workspace, write_checkpoint

from qloop.checkpoint.store import (
    CheckpointStore,
    DamagedError,
    File,
    GoodCheckpoint,
    Manifest,
)

ROOT = Path("/run")
STEPS = (10, 20, 30, 40, 50, 60)
NAMES = ("model.safetensors", "optimizer.safetensors", "progress.json")
LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 2.5, 60: 0.5}
PROMISE = "newest returned save found, byte for byte; two good ones kept; next save works"


class ViolationError(AssertionError):
    """A promise did not hold."""


class Saver(CheckpointStore):
    """Saves in one call; the variants below replace it."""

    def write(self, step: int, files: Any, facts: Any, held_out_loss: Any = None) -> GoodCheckpoint:
        return write_checkpoint(self, step, files, facts, held_out_loss)


def content_of(step: int, name: str) -> bytes:
    """Gives the bytes of a file of a step, different for every step."""
    rng = random.Random(f"{step} {name}")
    return rng.randbytes(rng.randrange(40, 200))


def files_of(step: int) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Gives the files of a step in pieces, as the product does."""
    for name in NAMES:
        content = content_of(step, name)
        yield name, iter([memoryview(content[:16]), memoryview(content[16:])])


def work(store: Saver, returned: list[int], goes_on: bool = False) -> None:
    """Rotates and saves; notes which saves returned. `goes_on` is training over errors."""
    rotate = functools.partial(store.rotate, 2, 30, True, lambda message: None)
    for step in STEPS:
        try:
            rotate()
            store.write(step, files_of(step), {"loss": step / 7}, LOSSES[step])
            returned.append(step)
            if step % 20 == 0:
                rotate()
        except OSError:
            if not goes_on:
                raise


def check(
    disk: SimulatedDisk,
    returned: list[int],
    may_be_damaged: bool = False,
    new_store: Callable[[SimulatedDisk], Saver] | None = None,
) -> None:
    """Looks at a disk as a new process does.

    Raises:
        ViolationError: Naming the promise that did not hold.
    """
    disk.obstacle = lambda number, name: None
    new_store = new_store or (lambda disk: Saver(ROOT, disk))
    told: list[str] = []
    kept = new_store(disk).find_newest(told.append)
    if told and not may_be_damaged:
        raise ViolationError(f"a good checkpoint was moved aside: {told[0]}")
    if returned and (kept is None or kept.manifest.step < returned[-1]):
        raise ViolationError(f"{returned[-1]} had returned, found {kept and kept.manifest.step}")
    if kept:
        check_content(disk, kept)
    strict = Saver(ROOT, disk)
    good = [path for path in strict.list_checkpoints() if is_good(strict, path)]
    if len(good) < min(2, len(returned)):
        raise ViolationError(f"{len(good)} good after {len(returned)} saves had returned")
    try:
        strict.write(99, files_of(99), {}, None)
    except OSError as error:
        raise ViolationError(f"the next save failed: {error}") from error
    left = [name for name in disk.list(ROOT) if name.startswith(".")]
    if left:
        raise ViolationError(f"left behind: {left}")


def check_content(disk: SimulatedDisk, kept: GoodCheckpoint) -> None:
    """Compares a checkpoint's bytes with those of the step that its name says."""
    step = int(kept.path.name.split("-")[1])
    for name in NAMES:
        found = disk.measure_file(kept.path / name)
        if found is None or b"".join(disk.read(kept.path / name)) != content_of(step, name):
            raise ViolationError(f"{kept.path.name}/{name} was accepted and is not what was saved")


def is_good(store: CheckpointStore, path: Path) -> bool:
    try:
        store.verify(path)
    except DamagedError:
        return False
    return True


@functools.cache
def count_calls() -> int:
    """Counts the calls of an undisturbed workload."""
    disk = SimulatedDisk(ROOT)
    work(Saver(ROOT, disk), [])
    return len(disk.calls)


def judge(attack: str, trials: Iterable[tuple[str, Callable[[], None]]], note: str = "") -> Row:
    """Runs trials and counts those in which every promise held."""
    count = survived = 0
    first_failure = ""
    for name, trial in trials:
        count += 1
        try:
            trial()
            survived += 1
        except ViolationError as violation:
            first_failure = first_failure or f"{name}: {violation}"
    return Row(attack, count, survived, PROMISE, note, first_failure=first_failure)


def kill(number: int) -> None:
    """Kills the process before one call; the system goes on and loses nothing that it was given."""
    disk, returned = SimulatedDisk(ROOT), []
    disk.obstacle = crash_at(number)
    with contextlib.suppress(Crash):
        work(Saver(ROOT, disk), returned)
    check(disk, returned)


def run_kills() -> Row:
    """Kills before every single call."""
    trials = ((f"call {n}", functools.partial(kill, n)) for n in range(count_calls()))
    return judge("kill -9 before every call of the disk (simulated)", trials, "exhaustive")


def lose_power(number: int, seed: str, store_type: type = Saver) -> None:
    """Loses power before one call; whatever was not synced survives at random."""
    disk, returned = SimulatedDisk(ROOT), []
    disk.obstacle = crash_at(number)
    with contextlib.suppress(Crash):
        work(store_type(ROOT, disk), returned)
    disk.lose_power(random.Random(seed))
    check(disk, returned, True, lambda disk: store_type(ROOT, disk))


def run_power_losses(survivals: int, seed: int) -> Row:
    """Loses power before every call, several times with other survivors."""
    trials = (
        (
            f"call {n}, seed {seed}-{number}",
            functools.partial(lose_power, n, f"{seed}-{n}-{number}"),
        )
        for n in range(count_calls() + 1)
        for number in range(survivals)
    )
    return judge("loss of power at every call (simulated)", trials, f"{survivals} survivals a call")


def fill(seed: str) -> None:
    """Fills the disk from a random call on, for a while; training goes on over failed saves."""
    rng = random.Random(seed)
    first = rng.randrange(count_calls())
    last = first + rng.choice([1, 2, 5, 20, 60, 1000])
    disk, returned = SimulatedDisk(ROOT), []
    disk.obstacle = full_between(first, last)
    work(Saver(ROOT, disk), returned, goes_on=True)
    check(disk, returned)


def run_full_disks(trials: int, seed: int) -> Row:
    """Fills the disk at random times."""
    named = ((f"seed {seed}-{n}", functools.partial(fill, f"{seed}-{n}")) for n in range(trials))
    return judge("disk full for a while (simulated)", named)


def fail(first: int, last: int) -> None:
    """Fails every call between two; training goes on over failed saves."""
    disk, returned = SimulatedDisk(ROOT), []
    disk.obstacle = failing_between(first, last)
    work(Saver(ROOT, disk), returned, goes_on=True)
    # A read that fails looks like damage: such a checkpoint is moved aside, never deleted.
    check(disk, returned, may_be_damaged=True)


def run_io_errors() -> Row:
    """Fails each call once, and everything from each call on."""
    trials = [
        (f"call {n}, {length} calls", functools.partial(fail, n, n + length))
        for n in range(count_calls())
        for length in (1, 2, 10_000)
    ]
    return judge("I/O error at every call, once or from then on (simulated)", trials)


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


class DeletesFirst(Saver):
    """Makes room before it writes, as some do, and keeps one."""

    def write(self, step: int, files: Any, facts: Any, held_out_loss: Any = None) -> GoodCheckpoint:
        for path in self.list_checkpoints():
            self._delete(path)
        return super().write(step, files, facts, held_out_loss)


class ManifestFirst(Saver):
    """Vouches for files that are still to be written, in the final folder, without a check."""

    def write(self, step: int, files: Any, facts: Any, held_out_loss: Any = None) -> GoodCheckpoint:
        import hashlib

        path = self.folder / f"checkpoint-{step}"
        contents = [(name, b"".join(pieces)) for name, pieces in files]
        listed = {name: File(len(c), hashlib.sha256(c).hexdigest()) for name, c in contents}
        manifest = Manifest(step, held_out_loss, dict(facts), listed)
        self._disk.make_folder(path)
        self._seal(path, manifest)
        for name, content in contents:
            self.write_file(path, name, [memoryview(content)])
        self._disk.sync_folder(self.folder)
        return GoodCheckpoint(path, manifest)


class NoVerification(Saver):
    """Believes a manifest that it can read."""

    def verify(self, path: Path, with_hashes: bool = True) -> Manifest:
        return self._read_manifest(path)


class SizesOnly(Saver):
    def verify(self, path: Path, with_hashes: bool = True) -> Manifest:
        return super().verify(path, with_hashes=False)


class SealsAfterRename(Saver):
    """Gives the folder its name, deletes the old ones, and vouches for the new one last."""

    def _seal(self, unfinished: Path, manifest: Manifest) -> None:
        path = self.folder / f"checkpoint-{manifest.step}"
        self._disk.rename(unfinished, path)
        for old in self.list_checkpoints()[:-1]:
            self._delete(old)
        super()._seal(path, manifest)
        self._disk.rename(path, unfinished)


class RotatesFirst(Saver):
    """Deletes the old ones before the new one has its name."""

    def _seal(self, unfinished: Path, manifest: Manifest) -> None:
        for path in self.list_checkpoints():
            self._delete(path)
        super()._seal(unfinished, manifest)


class CountsUnverified(Saver):
    """Rotates by name alone: a damaged one takes the place of a good one."""

    def rotate(self, keep: int, keep_every: int, keep_best: bool, say: Any) -> None:
        for path in self.list_checkpoints()[:-keep]:
            self._delete(path)


# What is broken, on which disk, and what the trials must see of it.
MUTANTS: dict[str, tuple[type, type, str]] = {
    "deletes before it saves": (DeletesFirst, SimulatedDisk, "had returned"),
    "syncs no file": (Saver, NoFileSync, "had returned"),
    "syncs no folder of files": (Saver, NoFolderSync, "had returned"),
    "syncs no parent folder": (Saver, NoParentSync, "had returned"),
    "writes the manifest first": (ManifestFirst, SimulatedDisk, "moved aside"),
    "syncs no file, verifies nothing": (NoVerification, NoFileSync, "was accepted"),
    "syncs no file, compares sizes only": (SizesOnly, NoFileSync, "was accepted"),
    "seals after the rename": (SealsAfterRename, SimulatedDisk, "found None"),
    "rotates before the rename": (RotatesFirst, SimulatedDisk, "1 good after"),
}


def try_mutant(store_type: type, disk_type: type, seed: str) -> None:
    """One random trial: a kill or a loss of power at a random call."""
    rng = random.Random(seed)
    disk, returned = disk_type(ROOT), []
    disk.obstacle = crash_at(rng.randrange(count_calls()))
    with contextlib.suppress(Crash):
        work(store_type(ROOT, disk), returned)
    has_power = rng.random() < 0.3
    if not has_power:
        disk.lose_power(rng)
    check(disk, returned, not has_power, lambda disk: store_type(ROOT, disk))


def catch(store_type: type, disk_type: type, sign: str, trials: int, seed: int) -> bool:
    """Whether a trial notices a variant by its sign."""
    for number in range(trials):
        try:
            try_mutant(store_type, disk_type, f"{seed}-{number}")
        except ViolationError as violation:
            if sign in str(violation):
                return True
    return False


def rotate_beside_damage(store_type: type) -> None:
    """Two checkpoints rot on the disk; the next rotation must not delete the good ones for them."""
    disk = SimulatedDisk(ROOT)
    store = Saver(ROOT, disk)
    for step in STEPS[:4]:
        store.write(step, files_of(step), {}, None)
    for step in STEPS[2:4]:
        disk._find(ROOT / f"checkpoint-{step}" / NAMES[0]).seen[0] ^= 1
    later = store_type(ROOT, disk)
    later.write(STEPS[4], files_of(STEPS[4]), {}, None)
    later.rotate(keep=2, keep_every=0, keep_best=False, say=lambda message: None)
    check(disk, list(STEPS[:3]), may_be_damaged=True)


def run_mutants(trials: int, seed: int) -> Row:
    """Breaks one rule at a time; the trials must notice, and see nothing where none is broken."""
    caught = [name for name, mutant in MUTANTS.items() if catch(*mutant, trials, seed)]
    try:
        rotate_beside_damage(CountsUnverified)
    except ViolationError:
        caught.append("counts damaged ones as kept")
    rotate_beside_damage(Saver)
    missed = sorted({*MUTANTS, "counts damaged ones as kept"} - {*caught})
    if catch(Saver, SimulatedDisk, "", trials, seed):
        missed.append("the unbroken protocol is reported too")
    return Row(
        "harmful variants of the protocol, under the same trials",
        len(MUTANTS) + 1,
        len(MUTANTS) + 1 - len(missed),
        "every one is caught, and the unbroken one never",
        "; ".join(caught),
        first_failure="; ".join(missed),
    )


def run(workspace: Workspace | None, is_short: bool) -> list[Row]:
    """Runs all of it; short: a few hundred trials each, kills exhaustively in any case."""
    return [
        run_kills(),
        run_power_losses(2 if is_short else 50, seed=1),
        run_full_disks(300 if is_short else 3000, seed=2),
        run_io_errors(),
        run_mutants(500 if is_short else 2000, seed=3),
    ]
