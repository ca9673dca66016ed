"""The system calls that save and verify checkpoints; they make no decisions.

The order of the calls in `checkpoint/store.py` decides which failures a checkpoint survives. Tests
replace the disk by one that loses data, fills up or fails at any call (`tests/torture/`).
"""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_PIECE_BYTES = 1 << 22


class FileSystem:
    """A real disk; every method raises OSError as the system does."""

    def make_folder(self, path: Path) -> None:
        """Creates a folder, which must not exist yet."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Creates a file, which must not exist yet; returns a descriptor for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def append(self, descriptor: int, data: memoryview) -> None:
        """Writes all of `data`."""
        data = data.cast("B") if data.nbytes else data  # so that slices count bytes
        while data.nbytes:
            data = data[os.write(descriptor, data[:_PIECE_BYTES]) :]

    def sync(self, descriptor: int) -> None:
        """Returns once the file's bytes are on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Closes a file."""
        os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Returns once the names in the folder are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Renames a file or folder atomically."""
        source.rename(target)

    def delete_file(self, path: Path) -> None:
        """Deletes a file or a link."""
        path.unlink()

    def delete_folder(self, path: Path) -> None:
        """Deletes an empty folder."""
        path.rmdir()

    def list(self, path: Path) -> list[str]:
        """Returns the sorted names in a folder; none if it does not exist."""
        return sorted(os.listdir(path)) if path.is_dir() else []

    def is_folder(self, path: Path) -> bool:
        """Whether the path is a folder and not a link to one."""
        return path.is_dir() and not path.is_symlink()

    def measure_file(self, path: Path) -> int | None:
        """Returns the bytes of a regular file; None for a link, a pipe, or if nothing is there."""
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
        """Returns the bytes that this user may still write on the folder's disk."""
        return shutil.disk_usage(path).free
