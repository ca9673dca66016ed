"""A disk in memory that can lose power, fill up, fail, or see its process killed at any call.

It keeps what a running system sees apart from what is on the platter. File bytes get there when the
file is synced, names when their folder is. At a power loss everything else is up to chance: of each
unsynced file the new bytes are kept, lost, cut, zeroed or another file's, and each unsynced change
of names happened or not, on its own. That is harsher than a journalling file system, on purpose. A
rename is one change.

A sync that failed has forgotten the bytes: the next one returns and writes nothing, as on Linux,
where the pages count as clean after the error was told once.
"""

import errno
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qloop.checkpoint.filesystem import FileSystem

TAKES_SPACE = frozenset(("make_folder", "create", "append"))
# Where a full disk shows on file systems that find room only when bytes go to the platter.
TAKES_SPACE_LATE = frozenset(("sync", "sync_folder", "rename"))
CHANGES = frozenset(
    (*TAKES_SPACE, *TAKES_SPACE_LATE, "close", "delete_file", "delete_folder"),
)
PIECE_BYTES = 64

Names = dict[str, "File | Folder"]
Tree = dict[str, "bytes | Tree"]


class Crash(BaseException):
    """The process is gone; no handler of the product sees this."""


class File:
    """Bytes as seen, how many of them were synced, and whether a failed sync forgot the rest."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.synced_bytes = 0
        self.is_forgotten = False

    def survive(self, rng: random.Random) -> None:
        """Becomes what is found after a power loss; what was synced stays."""
        tail = bytes(self.seen[self.synced_bytes :])
        cut = rng.randrange(len(tail) + 1)
        head, lost_bytes = tail[:cut], len(tail) - cut
        outcomes = (
            *(tail, b"", head, bytes(len(tail))),
            *(head + bytes(lost_bytes), head + rng.randbytes(lost_bytes)),
        )
        self.seen[self.synced_bytes :] = rng.choice(outcomes)
        self.synced_bytes, self.is_forgotten = len(self.seen), False


class Folder:
    """Names as seen and names as synced."""

    def __init__(self) -> None:
        self.seen: Names = {}
        self.synced: Names = {}


class Change(NamedTuple):
    """A change of names that is not synced yet; it happened in all its folders or in none."""

    edits: tuple[tuple[Folder, Callable[[Names], Any]], ...]

    def make_durable(self) -> None:
        for folder, edit in self.edits:
            edit(folder.synced)


class Trouble(NamedTuple):
    """Which calls fail, by number and name, and with which error."""

    numbers: range
    names: frozenset[str] | None
    """None: all."""
    error: int

    def hits(self, number: int, name: str) -> bool:
        return number in self.numbers and (self.names is None or name in self.names)


class SimulatedDisk(FileSystem):
    """Answers every call of a FileSystem; `root` is there from the start, synced."""

    def __init__(self, root: Path) -> None:
        self.calls: list[str] = []
        """Names of all calls so far, each piece that is read being one; their count is the number
        of the next."""
        self.changes = 0
        """Those among them that change something, or make it durable."""
        self._root_parts = root.parts
        self._root = Folder()
        self._journal: list[Change] = []
        self._open: dict[int, File] = {}
        self._descriptors = 0
        self._crash_at: int | None = None
        self._is_dead = False
        self._trouble: Trouble | None = None

    def crash_before(self, change: int) -> None:
        """Kills the process before the change of that number, counted from 0."""
        self._crash_at = change

    def fill(self, first: int, last: int, is_late: bool = False) -> None:
        """From call `first` to before `last`, nothing more fits; late: that shows at the sync."""
        names = TAKES_SPACE_LATE if is_late else TAKES_SPACE
        self._trouble = Trouble(range(first, last), names, errno.ENOSPC)

    def fail_call(
        self, number: int, error: int = errno.EIO, lasts: int = 1, names: Iterable[str] = ()
    ) -> None:
        """Lets a call fail, and all (or those of certain names) up to `lasts` calls from there."""
        numbers = range(number, number + lasts)
        self._trouble = Trouble(numbers, frozenset(names) or None, error)

    def restart(self) -> None:
        """Ends the process, if it still runs, and whatever troubled the disk."""
        self._open, self._crash_at, self._is_dead, self._trouble = {}, None, False, None

    def lose_power(self, rng: random.Random) -> None:
        """Loses what was not synced, or some of it, and starts anew."""
        self.restart()
        likelihood = rng.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        for change in self._journal:
            if rng.random() < likelihood:
                change.make_durable()
        self._journal = []
        survive(self._root, rng)

    def look(self, path: Path) -> "Tree":
        """Gives all that is in a folder, by name, for whoever judges; no call of the product."""
        return copy_tree(self._folder(path))

    def flip_bit(self, path: Path, rng: random.Random) -> None:
        """Lets a bit of a file rot."""
        seen = self._find(path).seen
        seen[rng.randrange(len(seen))] ^= 1 << rng.randrange(8)

    def make_folder(self, path: Path) -> None:
        self._begin("make_folder")
        self._add(path, Folder())

    def create(self, path: Path) -> int:
        self._begin("create")
        file = File()
        self._add(path, file)
        self._descriptors += 1
        self._open[self._descriptors] = file
        return self._descriptors

    def append(self, descriptor: int, data: memoryview) -> None:
        content = bytes(data)
        try:
            self._begin("append")
        except OSError:
            fits = len(content) * (len(self.calls) % 3) // 3
            self._opened(descriptor).seen += content[:fits]
            raise
        self._opened(descriptor).seen += content

    def sync(self, descriptor: int) -> None:
        file = self._opened(descriptor)
        try:
            self._begin("sync")
        except OSError:
            file.is_forgotten = True
            raise
        if not file.is_forgotten:
            file.synced_bytes = len(file.seen)

    def close(self, descriptor: int) -> None:
        self._opened(descriptor)
        self._begin("close")
        del self._open[descriptor]

    def sync_folder(self, path: Path) -> None:
        self._begin("sync_folder")
        folder = self._folder(path)
        journal, self._journal = self._journal, []
        for change in journal:
            if any(edited is folder for edited, _ in change.edits):
                change.make_durable()
            else:
                self._journal.append(change)

    def rename(self, source: Path, target: Path) -> None:
        self._begin("rename")
        node = self._check_rename(source, target)
        if source == target:
            return
        before, after = self._folder(source.parent), self._folder(target.parent)
        self._change(
            (before, lambda names: names.pop(source.name, None)),
            (after, lambda names: names.__setitem__(target.name, node)),
        )

    def delete_file(self, path: Path) -> None:
        self._begin("delete_file")
        if not isinstance(self._find(path), File):
            raise refusal(errno.EISDIR, path)
        self._remove(path)

    def delete_folder(self, path: Path) -> None:
        self._begin("delete_folder")
        if self._folder(path).seen:
            raise refusal(errno.ENOTEMPTY, path)
        self._remove(path)

    def list(self, path: Path) -> "list[str]":
        self._begin("list")
        return sorted(self._folder(path).seen) if self._has_folder(path) else []

    def is_folder(self, path: Path) -> bool:
        self._begin("is_folder")
        return self._has_folder(path)

    def measure_file(self, path: Path) -> int | None:
        try:
            self._begin("measure_file")
            node = self._find(path)
        except OSError:
            return None
        return len(node.seen) if isinstance(node, File) else None

    def read(self, path: Path) -> Iterator[bytes]:
        self._begin("read")
        node = self._find(path)
        if not isinstance(node, File):
            raise refusal(errno.EISDIR, path)
        for start in range(0, len(node.seen), PIECE_BYTES):
            if start:
                self._begin("read")
            yield bytes(node.seen[start : start + PIECE_BYTES])

    def count_free_bytes(self, path: Path) -> int:
        self._begin("count_free_bytes")
        self._find(path)
        return 1 << 40

    def _begin(self, name: str) -> None:
        """Counts a call; raises what is to happen before it takes effect."""
        if self._is_dead or (name in CHANGES and self.changes == self._crash_at):
            self._is_dead = True
            raise Crash
        number = len(self.calls)
        self.calls.append(name)
        self.changes += name in CHANGES
        if self._trouble and self._trouble.hits(number, name):
            raise OSError(self._trouble.error, os.strerror(self._trouble.error), name)

    def _check_rename(self, source: Path, target: Path) -> File | Folder:
        """Refuses a rename as Linux does, in its order; gives what is to be renamed."""
        self._folder(source.parent)
        names = self._folder(target.parent).seen
        node, old = self._find(source), names.get(target.name)
        if source in target.parents:
            raise refusal(errno.EINVAL, target)
        if target in source.parents:
            raise refusal(errno.ENOTEMPTY, target)
        if isinstance(old, Folder) and not isinstance(node, Folder):
            raise refusal(errno.EISDIR, target)
        if isinstance(old, File) and not isinstance(node, File):
            raise refusal(errno.ENOTDIR, target)
        if isinstance(old, Folder) and old is not node and old.seen:
            raise refusal(errno.ENOTEMPTY, target)
        return node

    def _add(self, path: Path, node: File | Folder) -> None:
        folder = self._folder(path.parent)
        if path.name in folder.seen:
            raise refusal(errno.EEXIST, path)
        self._change((folder, lambda names: names.__setitem__(path.name, node)))

    def _remove(self, path: Path) -> None:
        self._change((self._folder(path.parent), lambda names: names.pop(path.name, None)))

    def _change(self, *edits: tuple[Folder, Callable[[Names], Any]]) -> None:
        for folder, edit in edits:
            edit(folder.seen)
        self._journal.append(Change(edits))

    def _opened(self, descriptor: int) -> File:
        if descriptor not in self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._open[descriptor]

    def _has_folder(self, path: Path) -> bool:
        try:
            return isinstance(self._find(path), Folder)
        except OSError:
            return False

    def _folder(self, path: Path) -> Folder:
        node = self._find(path)
        if not isinstance(node, Folder):
            raise refusal(errno.ENOTDIR, path)
        return node

    def _find(self, path: Path) -> File | Folder:
        node: File | Folder = self._root
        depth = len(self._root_parts)
        assert path.parts[:depth] == self._root_parts, path
        for name in path.parts[depth:]:
            if not isinstance(node, Folder):
                raise refusal(errno.ENOTDIR, path)
            if name not in node.seen:
                raise refusal(errno.ENOENT, path)
            node = node.seen[name]
        return node


def survive(folder: Folder, rng: random.Random) -> None:
    """Lets a folder and all that is in it become what is found after a power loss."""
    folder.seen = dict(folder.synced)
    for node in folder.seen.values():
        if isinstance(node, Folder):
            survive(node, rng)
        else:
            node.survive(rng)


def copy_tree(folder: Folder) -> Tree:
    """Gives names and bytes as seen."""
    return {
        name: copy_tree(node) if isinstance(node, Folder) else bytes(node.seen)
        for name, node in folder.seen.items()
    }


def refusal(number: int, path: Path) -> OSError:
    """Builds the error that the system would raise: of its own class, where it has one."""
    return OSError(number, os.strerror(number), str(path))
