"""One writer for a run's folder: a lock that dies with its process."""

import contextlib
import fcntl
import json
import os
import socket
import uuid
from datetime import datetime
from pathlib import Path

from qloop.errors import LockedError, telling_of_disk_errors


class RunLock:
    """Holds `<run>/.lock` from `acquire` to `release` or to the end of the process.

    The system frees it when its process ends, however that happens, so that nothing is left to
    clean up after a `kill -9`. Some network file systems lock on each machine for itself; there,
    `check` finds that another process has written its own name into the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / ".lock"
        self._stream: int | None = None
        self._made_folder = False
        self._text = ""

    def acquire(self) -> None:
        """Takes the lock; makes the folder if there is none.

        Raises:
            LockedError: Another process holds it.
            ConfigError: The folder cannot be written.
            CheckpointError: The disk is full or broken.
        """
        with telling_of_disk_errors(self._folder):
            self._made_folder = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            while self._stream is None:
                self._stream = self._open_and_lock()
            holder = {
                "host": socket.gethostname(),
                "process": os.getpid(),
                "since": datetime.now().astimezone().isoformat(timespec="seconds"),
                "id": uuid.uuid4().hex,
            }
            self._text = json.dumps(holder) + "\n"
            os.ftruncate(self._stream, 0)
            os.pwrite(self._stream, self._text.encode(), 0)

    def check(self) -> None:
        """Makes sure that the lock is still ours; takes it anew if somebody deleted its file.

        Raises:
            LockedError: Another process has written into it.
        """
        try:
            text = self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            self.release()
            self.acquire()
            return
        if text != self._text:
            raise LockedError(
                f"{self._folder}: another process has taken this run's folder "
                f"({_describe(text)}); nothing more is written to it"
            )

    def release(self) -> None:
        """Frees the lock; a folder that was made for it and holds nothing else goes too."""
        if self._stream is None:
            return
        if self._made_folder and os.listdir(self._folder) == [self._file.name]:
            with contextlib.suppress(OSError):
                self._file.unlink()
                self._folder.rmdir()
        os.close(self._stream)
        self._stream = None

    def _open_and_lock(self) -> int | None:
        """Locks the file; None if it was deleted meanwhile, so that another try is due."""
        stream = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(stream).st_nlink:
                return stream
        except BlockingIOError as error:
            held_by = _describe(os.pread(stream, 4096, 0).decode(errors="replace"))
            os.close(stream)
            raise LockedError(
                f"{self._folder}: in use by another run of qloop ({held_by}); wait for it, stop "
                "it, or give another --experiment_name"
            ) from error
        os.close(stream)
        return None


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has left no name"
