"""Step directories that are whole or absent, on a disk that may fail at any call.

    checkpoints/
      checkpoint-100/             whole: its COMMIT vouches for its manifest, that for every file
        model.safetensors ...     the files that the manager gave
        manifest.json             step, losses, and size and SHA-256 of each file
        COMMIT                    the manifest's SHA-256
      .unfinished-checkpoint-200-1f0c/   being written, or left by a crash: the next save deletes it
      .deleted-checkpoint-50/     being deleted
      damaged-checkpoint-150/     failed its check: moved aside for a person to look at

The order of a save: every file is written, hashed on the way and synced; the manifest, then COMMIT,
then the folder are synced; only then does it get its name, in one rename, and the parent is synced.
Older ones go last of all. So a crash at any call leaves the older checkpoints as they were, and a
folder that carries the name of a checkpoint without being one is found out before a byte of it is
used. There is no pointer to the newest: it is the highest number that is good.

A manifest protects from damage, not from a person who writes a new one to go with other tensors.
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
# Errors of reading that tell of the disk, or of what lies there; no other is a checkpoint's fault.
_DAMAGE = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class DamagedError(Exception):
    """A step directory is not what was committed; says what is wrong with it."""


class File(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a committed directory says of itself."""

    step: int
    held_out_loss: float | None
    """Nats per target on the held-out documents, if they were measured after this very step."""
    facts: dict[str, Any]
    """What else was told at the save: the training loss, versions."""
    files: dict[str, File]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


class GoodCheckpoint(NamedTuple):
    """A good checkpoint."""

    path: Path
    manifest: Manifest


def _unlocked() -> None:
    """Stands where no lock guards the folder."""


class CheckpointStore:
    """The step directories of one run, for one writer."""

    def __init__(
        self, folder: Path, filesystem: FileSystem, check_lock: Callable[[], None] = _unlocked
    ) -> None:
        """Takes a folder, which is there before the first `write`.

        Args:
            folder: Where the step directories are.
            filesystem: The disk.
            check_lock: Called before a directory gets its name; raises if another writer has come.
        """
        self.folder = folder
        self._disk = filesystem
        self._check_lock = check_lock
        self._verified: dict[Path, Manifest] = {}  # each is hashed once in the life of a process

    def write(
        self,
        step: int,
        files: Iterable[tuple[str, Iterable[memoryview]]],
        facts: Mapping[str, Any],
        held_out_loss: float | None = None,
    ) -> GoodCheckpoint:
        """Writes checkpoint-<step>; when it returns, the directory is on the disk for good.

        Args:
            step: Its number; a directory of that name, which nobody expects, is moved aside.
            files: Name and content of each.
            facts: For the manifest.
            held_out_loss: For the manifest, and for the choice of the best.

        Raises:
            OSError: The disk refused. What was written is deleted again, or stays whole under its
                name if only the last sync was refused; every older directory is as it was.
        """
        unfinished = self.begin(step)
        try:
            written = {name: self.write_file(unfinished, name, data) for name, data in files}
        except OSError:
            self.abandon(unfinished)
            raise
        return self.commit(unfinished, step, written, facts, held_out_loss)

    def begin(self, step: int) -> Path:
        """Makes the folder that a save writes to; deletes what interrupted saves left.

        Raises:
            OSError: The disk refused.
        """
        self.delete_unfinished()
        unfinished = self.folder / f"{_UNFINISHED}checkpoint-{step}-{uuid.uuid4().hex[:8]}"
        self._disk.make_folder(unfinished)
        return unfinished

    def write_file(self, unfinished: Path, name: str, content: Iterable[memoryview]) -> File:
        """Writes a file of a save and hashes the very bytes that it hands to the disk.

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
        """Vouches for what was written, and gives it its name; see `write`.

        Raises:
            OSError: The disk refused.
        """
        path = self.folder / f"checkpoint-{step}"
        manifest = Manifest(step, held_out_loss, dict(facts), dict(written))
        try:
            self._seal(unfinished, manifest)
            self._check_lock()
            if path.name in self._disk.list(self.folder):
                self.set_aside(path)
            self._disk.rename(unfinished, path)
            self._disk.sync_folder(self.folder)
        except OSError:
            self.abandon(unfinished)
            raise
        self._verified[path] = manifest
        return GoodCheckpoint(path, manifest)

    def abandon(self, unfinished: Path) -> None:
        """Deletes what a failed save has written, as far as the disk allows."""
        with contextlib.suppress(OSError):  # nothing looks at it, and the next save tries again
            self._delete_tree(unfinished)

    def list_checkpoints(self) -> list[Path]:
        """Everything that is named like a checkpoint, the oldest step first."""
        names = ((_CHECKPOINT.fullmatch(name), name) for name in self._disk.list(self.folder))
        return [self.folder / name for _, name in sorted((int(m[1]), n) for m, n in names if m)]

    def list_damaged(self) -> list[Path]:
        """What was moved aside."""
        names = self._disk.list(self.folder)
        return [self.folder / name for name in names if name.startswith(_DAMAGED)]

    def verify(self, path: Path, with_hashes: bool = True) -> Manifest:
        """Checks a directory down to the last byte, before anybody parses any of it.

        Args:
            path: The directory, under whatever name.
            with_hashes: False reads no file's content, and finds only what shows in names and
                sizes.

        Raises:
            DamagedError: COMMIT, manifest or files do not agree, or something else lies there.
            OSError: It cannot be read for a reason that is no damage: no permission, too many open
                files.
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

    def find_newest(self, tell: Callable[[str], None]) -> GoodCheckpoint | None:
        """Finds the newest good checkpoint; damaged ones that are newer are moved aside and told.

        Raises:
            OSError: A damaged one cannot be moved.
        """
        for path in reversed(self.list_checkpoints()):
            kept = self._verify_once(path, tell)
            if kept:
                return kept
        return None

    def rotate(
        self, keep: int, keep_every: int, keep_best: bool, tell: Callable[[str], None]
    ) -> None:
        """Deletes what is not to be kept; only good checkpoints count as kept.

        Args:
            keep: Newest ones to keep.
            keep_every: Those of a step divisible by it stay too; 0: none.
            keep_best: The one of the lowest held-out loss stays too.
            tell: Gets a line on each damaged one that was met, and moved aside.

        Raises:
            OSError: The disk refused; the next rotation tries again.
        """
        found = [self._verify_once(path, tell) for path in reversed(self.list_checkpoints())]
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
        """Free space where the directories lie."""
        return self._disk.count_free_bytes(self.folder)

    def set_aside(self, path: Path) -> Path:
        """Moves a directory out of the way, under a name that no save and no resume looks at."""
        taken = set(self._disk.list(self.folder))
        base = f"{_DAMAGED}{path.name}"
        names = [base, *(f"{base}-{number}" for number in range(2, len(taken) + 3))]
        aside = self.folder / next(name for name in names if name not in taken)
        self._disk.rename(path, aside)
        self._disk.sync_folder(self.folder)
        self._verified.pop(path, None)
        return aside

    def delete_unfinished(self) -> None:
        """Deletes what interrupted saves and deletions left, as far as the disk allows."""
        for name in self._disk.list(self.folder):
            if name.startswith((_UNFINISHED, _DELETED)):
                self.abandon(self.folder / name)

    def _seal(self, unfinished: Path, manifest: Manifest) -> None:
        """Vouches for what was written: first the manifest, then COMMIT, then the names."""
        sealed = self.write_file(unfinished, MANIFEST, [memoryview(_dump(manifest))])
        self.write_file(unfinished, COMMIT, [memoryview(f"{sealed.sha256}\n".encode())])
        self._disk.sync_folder(unfinished)

    def _delete(self, path: Path) -> None:
        """Deletes a checkpoint; it loses its name first, so that nobody ever sees a part of it."""
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

    def _verify_once(self, path: Path, tell: Callable[[str], None]) -> GoodCheckpoint | None:
        if path not in self._verified:
            try:
                self._verified[path] = self.verify(path)
            except DamagedError as error:
                tell(f"{path}: damaged: {error}; moved to {self.set_aside(path).name}")
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
        # Dot files are the business of the file system and of editors; nothing here loads them.
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


def find_best(good: Iterable[GoodCheckpoint]) -> GoodCheckpoint | None:
    """Gives the checkpoint of the lowest held-out loss, the newest of equal ones."""
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
