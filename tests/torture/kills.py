"""Real runs under `kill -9` at random moments, most of them inside a save, and resumed.

A parent imports the libraries once and forks a child for every attempt; a child trains until it is
killed or done. Half of the kills come at a random time, half before a random call of the disk. In
the end losses, weights and moments must be those of a run that nobody disturbed.
"""

import collections
import contextlib
import hashlib
import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rows import Row
from workspace import Workspace, reset_accelerate

import qloop.run
import qloop.train
from qloop.checkpoint.store import CheckpointStore, DamagedError
from qloop.config.keys import Config
from qloop.errors import QloopError
from qloop.storage.filesystem import FileSystem

STEPS = 24
KEPT = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "tokens_seen")
MUTATING = (
    *("make_folder", "create", "append", "sync", "close", "sync_folder", "rename"),
    *("delete_file", "delete_folder"),
)


class Shared:
    """What a child leaves behind for its parent, even when it is killed."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 64)

    @property
    def calls(self) -> int:
        """Calls of the disk so far."""
        return int.from_bytes(self._memory[:8], "little")

    @calls.setter
    def calls(self, value: int) -> None:
        self._memory[:8] = value.to_bytes(8, "little")

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._memory[8] == 1

    @saving.setter
    def saving(self, value: bool) -> None:
        self._memory[8] = int(value)


class DeadlyDisk(FileSystem):
    """A real disk whose process is killed before a call."""

    shared: Shared
    deadly_call: int | None

    def __getattribute__(self, name: str) -> Any:
        if name in MUTATING:
            shared, deadly_call = DeadlyDisk.shared, DeadlyDisk.deadly_call
            if shared.calls == deadly_call:
                os.kill(os.getpid(), signal.SIGKILL)
            shared.calls += 1
        return super().__getattribute__(name)


class WatchedStore(CheckpointStore):
    """Tells when a save is under way."""

    def begin(self, step: int) -> Path:
        DeadlyDisk.shared.saving = True
        return super().begin(step)

    def commit(self, *values: Any) -> Any:
        kept = super().commit(*values)
        DeadlyDisk.shared.saving = False
        return kept


def fork(work: Callable[[], object], log: Path) -> int:
    """Runs `work` in a child, its output in a log; gives the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        reset_accelerate()
        work()
        code = 0
    except QloopError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """Waits for a child; gives its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(config: Config, shared: Shared, deadly_call: int | None = None) -> None:
    """What a child does."""
    DeadlyDisk.shared, DeadlyDisk.deadly_call = shared, deadly_call
    shared.calls, shared.saving = 0, False
    qloop.run.FileSystem = DeadlyDisk  # type: ignore[misc, attr-defined]
    qloop.run.CheckpointStore = WatchedStore  # type: ignore[misc, attr-defined]
    qloop.train.train(config, [])


def folder_of(config: Config) -> Path:
    return config.run.output_dir / str(config.run.experiment_name)


def read_run(config: Config, last_step: int = STEPS) -> tuple[list, dict[str, str]]:
    """Gives every line of the metrics, and hashes of the last checkpoint's tensors."""
    folder = folder_of(config)
    lines = (folder / "logs/metrics.jsonl").read_text().splitlines()
    curve = [[json.loads(line)[key] for key in KEPT] for line in lines]
    files = sorted((folder / f"checkpoints/checkpoint-{last_step}").glob("*.safetensors"))
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert len(hashes) == 2
    return curve, hashes


def find_harm(config: Config) -> str:
    """Looks at what a kill left; gives what is wrong with it, or nothing."""
    store = CheckpointStore(folder_of(config) / "checkpoints", FileSystem())
    if store.list_damaged():
        return f"moved aside: {store.list_damaged()}"
    for path in store.list_checkpoints():
        try:
            store.verify(path)
        except DamagedError as error:
            return f"{path.name}: {error}"
    return ""


class Kills:
    """Trials of one method and one way to save, compared with one undisturbed run of it."""

    def __init__(self, workspace: Workspace, method: str, is_async: bool) -> None:
        self.log = workspace.folder / f"{method}-{is_async}.log"
        if method != "full":
            finish(fork(lambda: workspace.method_keys(method), self.log))
        self.keys = {
            **workspace.method_keys(method),
            "async_checkpoint": str(is_async).lower(),
            "max_steps": STEPS,
            "save_steps": 3,
            "eval_steps": 12,
        }
        self.workspace = workspace
        self.name = f"{method}-{'async' if is_async else 'sync'}"
        self.shared = Shared()
        config = self.make_config("undisturbed")
        started = time.monotonic()
        code = finish(fork(lambda: train(config, self.shared), self.log))
        assert code == 0, self.log.read_text()
        self.seconds = time.monotonic() - started
        self.calls = self.shared.calls
        self.wanted = read_run(config)
        self.kills: collections.Counter[str] = collections.Counter()

    def make_config(self, name: str) -> Config:
        return self.workspace.make_config(experiment_name=f"{self.name}-{name}", **self.keys)

    def try_kills(self, seed: str) -> str:
        """Kills a run one to three times and lets it finish; gives what is wrong, or nothing."""
        rng = random.Random(seed)
        config = self.make_config(seed)
        for _ in range(rng.randrange(1, 4)):
            is_aimed = rng.random() < 0.5
            call = rng.randrange(self.calls) if is_aimed else None
            pid = fork(lambda call=call: train(config, self.shared, call), self.log)
            if not is_aimed:
                time.sleep(rng.uniform(0.05, 1.0) * self.seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            if code == -signal.SIGKILL:
                self.kills["all"] += 1
                self.kills["inside a save"] += self.shared.saving
            elif code:
                return f"ended with {code}: {self.log.read_text()[-500:]}"
            harm = find_harm(config)
            if harm:
                return harm
        code = finish(fork(lambda: train(config, self.shared), self.log))
        if code:
            return f"the last start ended with {code}: {self.log.read_text()[-500:]}"
        return "" if read_run(config) == self.wanted else "another curve or other tensors"


def run_kills(workspace: Workspace, trials: int, seed: int) -> Row:
    """Three in five trials train all weights, the others adapters; every second saves async."""
    methods = ("full", "full", "full", "lora", "qlora")
    groups: dict[tuple[str, bool], Kills] = {}
    survived, first_failure = 0, ""
    for number in range(trials):
        key = methods[number % 5], number % 2 == 0
        if key not in groups:
            groups[key] = Kills(workspace, *key)
        failure = groups[key].try_kills(f"{seed}-{number}")
        survived += not failure
        if failure and not first_failure:
            first_failure = f"seed {seed}-{number}, {groups[key].name}: {failure}"
    total = sum((group.kills for group in groups.values()), collections.Counter())
    return Row(
        "kill -9 of real runs (full, lora, qlora), then resumed",
        trials,
        survived,
        "every loss, weight and moment equals the undisturbed run's to the last bit",
        f"{total['all']:,} kills, {total['inside a save']:,} of them inside a save",
        first_failure=first_failure,
    )


def run(workspace: Workspace, is_short: bool) -> list[Row]:
    """Runs all; short: six trials."""
    return [run_kills(workspace, 6 if is_short else 200, seed=6)]
