"""Step directories that are complete or absent, on a disk that may fail at any call.

    checkpoints/
      checkpoint-100/             complete: COMMIT hashes the manifest, which hashes every file
        model.safetensors ...     see manager.py
        manifest.json             step, losses, and size and SHA-256 of each file
        COMMIT                    the manifest's SHA-256
      .unfinished-checkpoint-200-1f0c/   being written, or left by a crash: the next save deletes it
      .deleted-checkpoint-50/     being deleted
      damaged-checkpoint-150/     failed its check, moved aside for a person to examine

A save calls `begin`, `write_file` for each file, and `commit`; after an OSError, `abandon`. Each
file is hashed while it is written, then synced. `commit` syncs the manifest, COMMIT and the folder,
in this order, then renames the folder to its final name and syncs the parent. `rotate` deletes only
checkpoints that committed ones replace. A crash at any call thus leaves the older checkpoints
intact, and damage is detected before any byte is used. No file points to the newest checkpoint: it
is the good one with the highest number. The manifest protects against damage, not against forgery.
"""

import contextlib
import errno
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qloop.errors import CheckpointError
from qloop.storage.filesystem import FileSystem

FORMAT = 1
MANIFEST = "manifest.json"
COMMIT = "COMMIT"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished-"
_DELETED = ".deleted-"
_DAMAGED = "damaged-"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Formats that run code when they are loaded.
_REFUSED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".distcp")
_MAX_TEXT_BYTES = 1 << 24
# Read errors that mean damage; others, such as missing permission, may be temporary.
_DAMAGE = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class DamagedError(Exception):
    """A checkpoint differs from what was committed; the message names the difference."""


class File(NamedTuple):
    """A file's entry in the manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    held_out_loss: float | None
    """Nats per target on the held-out documents; None if not measured after this step."""
    facts: dict[str, Any]
    """Further values, such as the training loss."""
    files: dict[str, File]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


class GoodCheckpoint(NamedTuple):
    """A checkpoint that passed verification or was committed by this process."""

    path: Path
    manifest: Manifest


class CheckpointStore:
    """The checkpoints of one run, for one writer."""

    def __init__(
        self, folder: Path, filesystem: FileSystem, check_lock: Callable[[], None] = lambda: None
    ) -> None:
        """Stores the arguments.

        Args:
            folder: Must exist before the first save.
            filesystem: Makes all system calls; tests pass one that fails.
            check_lock: Called at the start of a save and before its rename; raises a LockedError if
                another process has taken the folder.
        """
        self.folder = folder
        self._disk = filesystem
        self._check_lock = check_lock
        self._verified: dict[Path, Manifest] = {}  # each is hashed once per process

    def begin(self, step: int) -> Path:
        """Creates the folder of a new save; deletes the leftovers of interrupted ones.

        Raises:
            OSError: The disk refused.
            LockedError: Another process has taken the run's folder.
        """
        self._check_lock()
        self._delete_leftovers()
        unfinished = self.folder / f"{_UNFINISHED}checkpoint-{step}-{uuid.uuid4().hex[:8]}"
        self._disk.make_folder(unfinished)
        return unfinished

    def write_file(self, unfinished: Path, name: str, content: Iterable[memoryview]) -> File:
        """Writes and syncs a file of a save; hashes the bytes passed to the disk.

        Raises:
            OSError: The disk refused.
        """
        digest, size = hashlib.sha256(), 0
        descriptor = self._disk.create(unfinished / name)
        try:
            for piece in content:
                self._disk.append(descriptor, piece)
                digest.update(piece)
                size += piece.nbytes
            self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)
        return File(size, digest.hexdigest())

    def commit(
        self,
        unfinished: Path,
        step: int,
        written: Mapping[str, File],
        facts: Mapping[str, Any],
        held_out_loss: float | None = None,
    ) -> GoodCheckpoint:
        """Completes a save: on return, checkpoint-<step> survives a loss of power.

        An existing folder of that name is moved aside.

        Raises:
            OSError: The disk refused. Every older checkpoint is untouched. If only the last sync
                was refused, the new one is complete under its name.
            LockedError: Another process has taken the run's folder.
        """
        path = self.folder / f"checkpoint-{step}"
        manifest = Manifest(step, held_out_loss, dict(facts), dict(written))
        self._seal(unfinished, manifest)
        self._check_lock()
        if path.name in self._disk.list(self.folder):
            self.set_aside(path)
        self._disk.rename(unfinished, path)
        self._disk.sync_folder(self.folder)
        self._verified[path] = manifest
        return GoodCheckpoint(path, manifest)

    def abandon(self, unfinished: Path) -> None:
        """Deletes the folder of a failed save, as far as the disk allows."""
        with contextlib.suppress(OSError):  # nobody reads it, and the next save tries again
            self._delete_tree(unfinished)

    def list_checkpoints(self) -> list[Path]:
        """Returns every path with the name of a checkpoint, in the order of steps."""
        names = ((_CHECKPOINT.fullmatch(name), name) for name in self._disk.list(self.folder))
        return [self.folder / name for _, name in sorted((int(m[1]), n) for m, n in names if m)]

    def list_damaged(self) -> list[Path]:
        """Returns the checkpoints that were moved aside."""
        names = self._disk.list(self.folder)
        return [self.folder / name for name in names if name.startswith(_DAMAGED)]

    def verify(self, path: Path, with_hashes: bool = True) -> Manifest:
        """Checks every byte of a checkpoint, of any folder name, before anything parses it.

        Without `with_hashes`, compares names and sizes only, and reads no tensor.

        Raises:
            DamagedError: COMMIT, manifest and files do not match, or there are other files.
            OSError: Reading failed without damage: missing permission, too many open files.
        """
        try:
            manifest = self._read_manifest(path)
            self._check_names(path, manifest)
            for name, expected in manifest.files.items():
                self._check_file(path / name, expected, with_hashes)
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            raise DamagedError(f"cannot be read: {error}") from error
        return manifest

    def find_newest(self, say: Callable[[str], None]) -> GoodCheckpoint | None:
        """Returns the newest good checkpoint; reports newer, damaged ones and moves them aside.

        Raises:
            OSError: A damaged one cannot be moved.
        """
        for path in reversed(self.list_checkpoints()):
            kept = self._verify_once(path, say)
            if kept:
                return kept
        return None

    def rotate(
        self, keep: int, keep_every: int, keep_best: bool, say: Callable[[str], None]
    ) -> None:
        """Deletes all good checkpoints but the newest; moves damaged ones aside.

        Args:
            keep: Number of newest good checkpoints to keep.
            keep_every: Also keeps those whose step is divisible by it; 0: none.
            keep_best: Also keeps the one with the lowest held-out loss.
            say: Called with a line on each damaged checkpoint.

        Raises:
            OSError: The disk refused; the next rotation tries again.
        """
        found = [self._verify_once(path, say) for path in reversed(self.list_checkpoints())]
        good = [kept for kept in found if kept]
        spared = {kept.path for kept in good[:keep]}
        if keep_every:
            spared |= {kept.path for kept in good if kept.manifest.step % keep_every == 0}
        best = find_best(good)
        if keep_best and best:
            spared.add(best.path)
        for kept in good:
            if kept.path not in spared:
                self._delete(kept.path)

    def count_free_bytes(self) -> int:
        """Returns the free space on the disk of the checkpoints."""
        return self._disk.count_free_bytes(self.folder)

    def set_aside(self, path: Path) -> Path:
        """Renames a checkpoint so that saves and resumes ignore it; returns the new path."""
        taken = set(self._disk.list(self.folder))
        base = f"{_DAMAGED}{path.name}"
        names = [base, *(f"{base}-{number}" for number in range(2, len(taken) + 3))]
        aside = self.folder / next(name for name in names if name not in taken)
        self._disk.rename(path, aside)
        self._disk.sync_folder(self.folder)
        self._verified.pop(path, None)
        return aside

    def _delete_leftovers(self) -> None:
        for name in self._disk.list(self.folder):
            if name.startswith((_UNFINISHED, _DELETED)):
                self.abandon(self.folder / name)

    def _seal(self, unfinished: Path, manifest: Manifest) -> None:
        """Writes and syncs the manifest, then COMMIT; then syncs the folder."""
        sealed = self.write_file(unfinished, MANIFEST, [memoryview(_dump(manifest))])
        self.write_file(unfinished, COMMIT, [memoryview(f"{sealed.sha256}\n".encode())])
        self._disk.sync_folder(unfinished)

    def _delete(self, path: Path) -> None:
        """Renames a checkpoint, then deletes it, so that no incomplete one has its name."""
        deleted = self.folder / f"{_DELETED}{path.name}"
        self._verified.pop(path, None)
        self._disk.rename(path, deleted)
        self._disk.sync_folder(self.folder)
        self._delete_tree(deleted)

    def _delete_tree(self, path: Path) -> None:
        for name in self._disk.list(path):
            if self._disk.is_folder(path / name):
                self._delete_tree(path / name)
            else:
                self._disk.delete_file(path / name)
        self._disk.delete_folder(path)

    def _verify_once(self, path: Path, say: Callable[[str], None]) -> GoodCheckpoint | None:
        if path not in self._verified:
            try:
                self._verified[path] = self.verify(path)
            except DamagedError as error:
                say(f"{path}: damaged: {error}; moved to {self.set_aside(path).name}")
                return None
        return GoodCheckpoint(path, self._verified[path])

    def _read_manifest(self, path: Path) -> Manifest:
        for name in (COMMIT, MANIFEST):
            size = self._disk.measure_file(path / name)
            if size is None or size > _MAX_TEXT_BYTES:
                raise DamagedError(f"{name} is {'missing' if size is None else 'too long'}")
        committed = b"".join(self._disk.read(path / COMMIT))
        text = b"".join(self._disk.read(path / MANIFEST))
        if committed != f"{hashlib.sha256(text).hexdigest()}\n".encode():
            raise DamagedError(f"{MANIFEST} is not the one that {COMMIT} vouches for")
        manifest = _parse(text)
        match = _CHECKPOINT.fullmatch(path.name)
        if match and int(match[1]) != manifest.step:
            raise DamagedError(f"it is the checkpoint of step {manifest.step}")
        return manifest

    def _check_names(self, path: Path, manifest: Manifest) -> None:
        listed = {*manifest.files, MANIFEST, COMMIT}
        for name in sorted(listed):
            if not _PLAIN_NAME.fullmatch(name) or name.endswith(_REFUSED_SUFFIXES):
                raise DamagedError(f"{name} is no file that a checkpoint holds")
        # Dot files belong to the file system and to editors; nothing loads them.
        found = {name for name in self._disk.list(path) if not name.startswith(".")}
        for name in sorted(listed ^ found):
            raise DamagedError(
                f"{name} is missing" if name in listed else f"{name} was put there by someone else"
            )

    def _check_file(self, file: Path, expected: File, with_hashes: bool) -> None:
        size = self._disk.measure_file(file)
        if size is None:
            raise DamagedError(f"{file.name} is no plain file")
        if size != expected.bytes:
            raise DamagedError(f"{file.name} has {size:,} bytes instead of {expected.bytes:,}")
        if not with_hashes:
            return
        digest = hashlib.sha256()
        for piece in self._disk.read(file):
            digest.update(piece)
        if digest.hexdigest() != expected.sha256:
            raise DamagedError(f"{file.name} is not as it was written: its SHA-256 differs")


def locate_checkpoints(place: Path) -> tuple[CheckpointStore, list[Path]]:
    """Finds the checkpoints that a path refers to.

    Args:
        place: A run's folder, its checkpoints folder, or one checkpoint.

    Returns:
        The store and its checkpoints, the oldest step first; `place` alone if that is a checkpoint.

    Raises:
        CheckpointError: The path cannot be read.
    """
    try:
        is_one = (place / COMMIT).exists() or (place / MANIFEST).exists()
        folder = place if is_one or not (place / "checkpoints").is_dir() else place / "checkpoints"
        if is_one or _CHECKPOINT.fullmatch(folder.name):
            return CheckpointStore(place.parent, FileSystem()), [place]
        store = CheckpointStore(folder, FileSystem())
        return store, store.list_checkpoints()
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read: {error.strerror}") from error


def find_checkpoint(place: Path, say: Callable[[str], None]) -> GoodCheckpoint:
    """Finds the newest good checkpoint that a path refers to, and verifies every byte of it.

    Changes nothing, so the path may belong to another run. `place` is as in `locate_checkpoints`;
    `say` is called with a line on each newer checkpoint that is not good.

    Raises:
        CheckpointError: None is good; the message says why for each.
    """
    store, paths = locate_checkpoints(place)
    problems = []
    for path in reversed(paths):
        try:
            found = GoodCheckpoint(path, store.verify(path))
        except (DamagedError, OSError) as error:
            problems.append(f"{path}: not a good checkpoint: {error}")
            continue
        for problem in problems:
            say(problem)
        return found
    problems.append(f"{place}: no good checkpoint; give a run's folder or a checkpoint-N")
    raise CheckpointError("\n".join(problems))


def find_best(good: Iterable[GoodCheckpoint]) -> GoodCheckpoint | None:
    """Returns the checkpoint with the lowest held-out loss, the newest of equal ones."""
    measured = [kept for kept in good if kept.manifest.held_out_loss is not None]
    return min(
        measured,
        key=lambda kept: (kept.manifest.held_out_loss, -kept.manifest.step),
        default=None,
    )


def _dump(manifest: Manifest) -> bytes:
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "held_out_loss": manifest.held_out_loss,
        **manifest.facts,
        "files": {name: file._asdict() for name, file in manifest.files.items()},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _parse(text: bytes) -> Manifest:
    try:
        content = json.loads(text)
        if content.pop("format") != FORMAT:
            raise DamagedError(f"{MANIFEST} is of another format than {FORMAT}")
        files = {name: File(**entry) for name, entry in content.pop("files").items()}
        return Manifest(
            step=content.pop("step"),
            held_out_loss=content.pop("held_out_loss"),
            files=files,
            facts=content,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is no manifest: {error!r}") from error
