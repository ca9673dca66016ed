"""Folders and files that are complete or absent, file locks, hashes and sizes.

`write_atomically` writes a file, `whole_folder` a folder: under a temporary name in the same
parent, renamed when complete.
"""

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
"""Exists while a folder is being filled; locked by the process that fills it."""
_PIECE_BYTES = 1 << 20


@contextlib.contextmanager
def whole_folder(path: Path, prefix: str = ".building-") -> Iterator[Path]:
    """Yields a new folder to fill; renames it to `path` when the block ends without an error.

    The folder is synced before the rename: after a loss of power, `path` has all of its files or
    does not exist. If the block raises, the folder is deleted. A locked file in it tells
    `delete_leftovers` that it is in use.

    Args:
        path: The final name; missing parents are created.
        prefix: Start of the temporary name; use another one where no leftovers may be deleted.

    Raises:
        OSError: The disk refuses, or `path` is a file or a folder that is not empty.
    """
    building = path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:8]}")
    building.mkdir(parents=True)
    try:
        with file_lock(building / _LOCK):
            yield building
            for file in building.rglob("*"):
                _sync(file)
            # Last, since a leftover without this file is never deleted.
            (building / _LOCK).unlink()
            _sync(building)
            building.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def delete_leftovers(parent: Path, prefix: str = ".building-") -> None:
    """Deletes the temporary folders of `whole_folder` that killed processes left."""
    for building in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # locked, renamed or deleted meanwhile
            with (building / _LOCK).open("r+") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A new folder whose file is not locked yet holds nothing else.
                is_leftover = len(list(building.iterdir())) > 1
            if is_leftover:
                shutil.rmtree(building)


@contextlib.contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, created if missing; waits for the process that has it.

    The system frees the lock when the process ends. The file is opened for writing because NFS
    locks such a file on all machines, but a folder on only one.
    """
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file's content; readers see the old or the new, even after the process dies."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def write_json(file: Path, content: Any) -> None:
    """Writes indented JSON atomically."""
    write_atomically(file, json.dumps(content, indent=2) + "\n")


def hash_files(files: list[Path]) -> str:
    """Hashes the names (relative to the common folder) and the bytes of files.

    Of links, pipes and files without read permission, only the name is hashed.
    """
    root = os.path.commonpath([file.parent for file in files])
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(os.path.relpath(file, root)) + b"\0")
        if stat.S_ISREG(file.lstat().st_mode) and os.access(file, os.R_OK):
            content = hashlib.sha256()
            with file.open("rb") as stream:
                while piece := stream.read(_PIECE_BYTES):
                    content.update(piece)
            digest.update(content.digest())
    return digest.hexdigest()


def show_bytes(count: float) -> str:
    """Formats a size with three digits and a decimal unit: `57 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
