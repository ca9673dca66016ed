"""The one door to the disk for checkpoints: plain system calls and no policy.

Tests put a disk in its place that loses, fills or fails (`tests/torture/`), so what a checkpoint
survives is decided by the order of these calls in `store.py`, and can be tried out at every one of
them.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_PIECE_BYTES = 1 << 22


class FileSystem:
    """Calls on a real disk; every one raises OSError as the system does."""

    def make_folder(self, path: Path) -> None:
        """Makes a folder, which must not be there yet."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Opens a new file for writing, which must not be there yet; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def append(self, descriptor: int, data: memoryview) -> None:
        """Writes all of `data`."""
        data = data.cast("B") if data.nbytes else data  # so that its items are what write counts
        while data.nbytes:
            data = data[os.write(descriptor, data[:_PIECE_BYTES]) :]

    def sync(self, descriptor: int) -> None:
        """Returns when the file's bytes are on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Closes a file."""
        os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Returns when the folder's names are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Gives a file or folder another name, in one instant."""
        source.rename(target)

    def delete_file(self, path: Path) -> None:
        """Deletes a file or a link."""
        path.unlink()

    def delete_folder(self, path: Path) -> None:
        """Deletes an empty folder."""
        path.rmdir()

    def list(self, path: Path) -> list[str]:
        """Names in a folder, sorted; none if there is no such folder."""
        return sorted(os.listdir(path)) if path.is_dir() else []

    def is_folder(self, path: Path) -> bool:
        """Whether it is a folder; a link to one is not."""
        return path.is_dir() and not path.is_symlink()

    def measure_file(self, path: Path) -> int | None:
        """Bytes of a plain file; None for anything else: a link, a pipe, nothing."""
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, path: Path) -> Iterator[bytes]:
        """Yields a file's bytes, piece by piece."""
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                yield piece

    def count_free_bytes(self, path: Path) -> int:
        """Free space for this user where the folder lies."""
        return shutil.disk_usage(path).free
