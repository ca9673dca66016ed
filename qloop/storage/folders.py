"""Files and folders that are whole or absent, and hashes of files."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LOCK = "in-use.lock"
"""In a folder that is being filled; the process that fills it holds it."""


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file's content: a reader, or a crash, sees the old or the new, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def write_json(file: Path, content: Any) -> None:
    """Writes JSON that a person can read."""
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def hash_files(files: list[Path]) -> str:
    """Hashes the names (below their common folder) and the bytes of some files."""
    root = os.path.commonpath([file.parent for file in files])
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(os.path.relpath(file, root)) + b"\0")
        if stat.S_ISREG(file.lstat().st_mode) and os.access(file, os.R_OK):
            content = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(2**20):
                    content.update(chunk)
            digest.update(content.digest())
    return digest.hexdigest()


def show_bytes(count: float) -> str:
    """Shows a size as one would say it: `57 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


@contextlib.contextmanager
def whole_folder(path: Path, prefix: str = ".building-") -> Iterator[Path]:
    """Yields a new folder to fill; it gets the name `path` when the block ends without an error.

    The folder is synced before the rename, so that after a loss of power the name stands for all of
    its files or does not exist. If the block raises, the folder is deleted. While it is filled, it
    holds a locked file, by which `delete_leftovers` knows it from what a killed process left.

    Args:
        path: The final name; its parents are created.
        prefix: Of the temporary name, in the same parent.

    Raises:
        OSError: The disk refuses, or `path` is a folder that is not empty.
    """
    building = path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:8]}")
    building.mkdir(parents=True)
    try:
        # A file open for writing: NFS locks such a file on all machines, a folder only on one.
        with (building / _LOCK).open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield building
            (building / _LOCK).unlink()
            sync_tree(building)
            building.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def delete_leftovers(parent: Path, prefix: str = ".building-") -> None:
    """Deletes the temporary folders that killed processes have left in a folder."""
    for building in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # in use, or gone by now
            with (building / _LOCK).open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # One that was made this moment is not locked yet, but has nothing else in it.
                is_leftover = len(list(building.iterdir())) > 1
            if is_leftover:
                shutil.rmtree(building)


def sync_tree(folder: Path) -> None:
    """Returns when a folder and everything below it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
