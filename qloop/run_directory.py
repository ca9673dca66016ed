"""The folder of a run: its paths, the check that it holds no other run, its lock, status.json.

output/<experiment_name, or the model's short name>/
  config.yaml     the config of the run; `--config` accepts it
  checkpoints/    checkpoint-N, each complete
  logs/           training_log.txt, metrics.jsonl, eval_results.json, data_report.json
  results/        the final evaluation, samples, loss.png
  status.json     state, step, reason
  .lock           names the running process, which holds a lock on it
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import uuid
from datetime import datetime
from pathlib import Path

from qloop.config.keys import Config, find_changes
from qloop.config.loading import dump_yaml, load_config
from qloop.errors import ConfigError, LockedError, explaining_disk_errors
from qloop.storage.filesystem import FileSystem
from qloop.storage.folders import write_atomically

_LOCK = ".lock"
_BEFORE_CONFIG = {_LOCK, ".config.yaml.tmp"}
"""Files that a run leaves if it is killed before its config.yaml is in place."""


class RunDirectory:
    """The paths of a run's files and folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.training_log = self.logs / "training_log.txt"
        self.metrics = self.logs / "metrics.jsonl"
        self.eval_results = self.logs / "eval_results.json"
        self.data_report = self.logs / "data_report.json"
        self.results = path / "results"
        self.status = path / "status.json"

    def refuse_another(self, config: Config) -> None:
        """Checks that the folder is new or holds the run of this config.

        Raises:
            ConfigError: It holds another run (the message lists the differences), a run that may
                not be continued, or files of something else.
        """
        if self.config.exists():
            # Older versions wrote paths relative to the working directory.
            before = load_config(self.config, {}, relative_to=Path()).config
            changes = find_changes(before, config)
            if changes:
                shown = "\n  ".join(changes)
                raise ConfigError(
                    f"{self.path}: holds another run, with other settings:\n  {shown}\n"
                    "give another --experiment_name to start a new run, the old settings to "
                    "continue, or the keys that may change: --allow_change "
                    f"{','.join(change.split(':')[0] for change in changes)}"
                )
            if config.run.resume == "never":
                raise ConfigError(
                    f"{self.path}: holds a run already, and resume is never; give another "
                    "--experiment_name, or --resume auto to continue it"
                )
        elif self.path.exists() and {*os.listdir(self.path)} - _BEFORE_CONFIG:
            raise ConfigError(
                f"{self.path}: is not empty but has no config.yaml, so it is no run of qloop; give "
                "another --experiment_name or --output_dir"
            )

    def create(self, config: Config) -> None:
        """Creates the folders and writes config.yaml.

        Raises:
            OSError: The disk refuses.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, dump_yaml(config))
        for folder in (self.checkpoints, self.logs, self.results):
            folder.mkdir(exist_ok=True)
        # If a parent folder's own entry is not on the disk, its checkpoints are lost.
        for folder in (self.path, self.path.parent):
            FileSystem().sync_folder(folder)

    def checkpoint_path(self, step: int) -> Path:
        """Returns the path of the checkpoint after a step."""
        return self.checkpoints / f"checkpoint-{step}"

    def write_status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json; `state` is running, finished, stopped, diverged or failed."""
        write_atomically(
            self.status, json.dumps({"state": state, "step": step, "reason": reason}) + "\n"
        )


def locate_run(config: Config) -> RunDirectory:
    """Returns the folder of the config's run; creates nothing.

    Raises:
        ConfigError: The model's short name is no folder name, the path is a file, or a link leads
            out of output_dir.
    """
    name = config.run.experiment_name
    if name is None:
        file = config.model.model_config_file
        name = file.stem if file else Path(config.model.model_name).name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ConfigError(
                f'experiment_name: the model\'s short name "{name}" is no folder name; give one'
            )
    run = RunDirectory(config.run.output_dir / name)
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"{run.path}: is no folder; give another --experiment_name")
    inside = config.run.output_dir.resolve()
    for path in (run.path, run.checkpoints, run.logs, run.results):
        if not path.resolve().is_relative_to(inside):
            raise ConfigError(
                f"{path}: is a link to {path.resolve()}, outside of output_dir {inside}; qloop "
                "writes nothing there; give that folder as --output_dir, or another "
                "--experiment_name"
            )
    return run


class RunLock:
    """Holds `<run>/.lock` from `acquire` to `release` or to the end of the process.

    The system frees the lock when the process ends, even by `kill -9`. Some network file systems
    lock each machine separately; there, `check` detects that another process has written its name
    into the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / _LOCK
        self._stream: int | None = None
        self._made_folder = False
        self._text = ""

    def acquire(self) -> None:
        """Takes the lock; creates the folder if it is missing.

        Raises:
            LockedError: Another process holds it.
            ConfigError: The folder cannot be written.
            CheckpointError: The disk is full or broken.
        """
        with explaining_disk_errors(self._folder):
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
        """Checks that this process still holds the lock; takes it again if its file is gone.

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
                f"({_describe(text)}); this one writes nothing more to it"
            )

    def release(self) -> None:
        """Frees the lock; deletes the folder if `acquire` created it and it holds nothing else."""
        if self._stream is None:
            return
        if self._made_folder and os.listdir(self._folder) == [self._file.name]:
            with contextlib.suppress(OSError):
                self._file.unlink()
                self._folder.rmdir()
        os.close(self._stream)
        self._stream = None

    def _open_and_lock(self) -> int | None:
        """Locks the file; returns None if it was deleted meanwhile and the caller must retry."""
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
        return "it left no name"
