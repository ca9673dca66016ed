"""A disk in memory that can lose power, fill up, fail, or see its process killed at any call.

It keeps what a running system sees apart from what is on the platter. File bytes reach the platter
when the file is synced, names when their folder is. At a power loss everything else is up to
chance: each unsynced file is kept, old, cut, zeroed or a mixture, and each unsynced change of names
happened or not, on its own. That is harsher than a journalling file system, on purpose.
"""

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from qloop.storage.filesystem import FileSystem

TAKES_SPACE = ("make_folder", "create", "append")


class Crash(BaseException):
    """The process is gone; no handler of the product sees this."""


class File:
    """Bytes as seen, and bytes as synced."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.synced = b""

    def survive(self, rng: random.Random) -> None:
        """Becomes what is found after a power loss."""
        seen, old = bytes(self.seen), self.synced
        if seen != old:
            cut = rng.randrange(len(seen) + 1)
            seen = rng.choice([seen, old, seen[:cut], bytes(len(seen)), seen[:cut] + old[cut:]])
        self.seen, self.synced = bytearray(seen), seen


class Folder:
    """Names as seen, names as synced, and the changes between the two."""

    def __init__(self) -> None:
        self.seen: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}
        self.changes: list[Callable[[dict], None]] = []

    def change(self, change: Callable[[dict], None]) -> None:
        """Makes a change that a power loss may undo until the next sync."""
        change(self.seen)
        self.changes.append(change)

    def survive(self, rng: random.Random) -> None:
        """Becomes what is found after a power loss, with all that is in it."""
        found = dict(self.synced)
        for change in self.changes:
            if rng.random() < 0.5:
                change(found)
        self.seen, self.synced, self.changes = found, dict(found), []
        for node in found.values():
            node.survive(rng)


class SimulatedDisk(FileSystem):
    """Answers every call of a FileSystem; `root` is there from the start."""

    def __init__(self, root: Path) -> None:
        self.calls: list[str] = []
        """Names of all calls so far; the number of the next one is their count."""
        self.obstacle: Callable[[int, str], None] = lambda number, name: None
        """Called before each call takes effect; may raise."""
        self._root_path = root
        self._root = Folder()
        self._open: dict[int, File] = {}
        self._descriptors = 0

    def lose_power(self, rng: random.Random) -> None:
        """Forgets what was not synced, or some of it."""
        self._open = {}
        self._root.survive(rng)

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
        try:
            self._begin("append")
        except OSError:
            self._open[descriptor].seen += bytes(data[: len(data) // 2])  # what still fitted
            raise
        self._open[descriptor].seen += bytes(data)

    def sync(self, descriptor: int) -> None:
        self._begin("sync")
        self._open[descriptor].synced = bytes(self._open[descriptor].seen)

    def close(self, descriptor: int) -> None:
        self._begin("close")
        del self._open[descriptor]

    def sync_folder(self, path: Path) -> None:
        self._begin("sync_folder")
        folder = self._folder(path)
        folder.synced, folder.changes = dict(folder.seen), []

    def rename(self, source: Path, target: Path) -> None:
        self._begin("rename")
        assert source.parent == target.parent
        folder, node = self._folder(source.parent), self._find(source)
        old = folder.seen.get(target.name)
        if old is node:
            return
        if isinstance(old, Folder) and not isinstance(node, Folder):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(target))
        if isinstance(old, File) and not isinstance(node, File):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(target))
        if isinstance(old, Folder) and old.seen:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(target))

        def move(names: dict) -> None:
            names.pop(source.name, None)
            names[target.name] = node

        folder.change(move)

    def delete_file(self, path: Path) -> None:
        self._begin("delete_file")
        if not isinstance(self._find(path), File):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        self._folder(path.parent).change(lambda names: names.pop(path.name, None))

    def delete_folder(self, path: Path) -> None:
        self._begin("delete_folder")
        if self._folder(path).seen:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        self._folder(path.parent).change(lambda names: names.pop(path.name, None))

    def list(self, path: Path) -> "list[str]":
        self._begin("list")
        return sorted(self._folder(path).seen) if self.is_folder(path) else []

    def is_folder(self, path: Path) -> bool:
        try:
            return isinstance(self._find(path), Folder)
        except OSError:
            return False

    def measure_file(self, path: Path) -> int | None:
        try:
            node = self._find(path)
        except OSError:
            return None
        return len(node.seen) if isinstance(node, File) else None

    def read(self, path: Path) -> Iterator[bytes]:
        self._begin("read")
        node = self._find(path)
        if isinstance(node, Folder):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        yield bytes(node.seen)

    def count_free_bytes(self, path: Path) -> int:
        return 1 << 40

    def _begin(self, name: str) -> None:
        number = len(self.calls)
        self.calls.append(name)
        self.obstacle(number, name)

    def _add(self, path: Path, node: File | Folder) -> None:
        folder = self._folder(path.parent)
        if path.name in folder.seen:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        folder.change(lambda names: names.__setitem__(path.name, node))

    def _folder(self, path: Path) -> Folder:
        node = self._find(path)
        if not isinstance(node, Folder):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))
        return node

    def _find(self, path: Path) -> File | Folder:
        node: File | Folder = self._root
        for name in path.relative_to(self._root_path).parts:
            if not isinstance(node, Folder):
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))
            if name not in node.seen:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
            node = node.seen[name]
        return node


def crash_at(number: int) -> Callable[[int, str], None]:
    """The process is killed before this call."""

    def obstacle(now: int, name: str) -> None:
        if now == number:
            raise Crash

    return obstacle


def full_between(first: int, last: int) -> Callable[[int, str], None]:
    """From one call to before another, nothing more fits on the disk."""

    def obstacle(now: int, name: str) -> None:
        if first <= now < last and name in TAKES_SPACE:
            raise OSError(errno.ENOSPC, "No space left on device")

    return obstacle


def failing_between(first: int, last: int) -> Callable[[int, str], None]:
    """From one call to before another, every call fails."""

    def obstacle(now: int, name: str) -> None:
        if first <= now < last:
            raise OSError(errno.EIO, "Input/output error")

    return obstacle
