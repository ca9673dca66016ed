"""One rank dies, or meets what the others do not: all leave alike, and nothing is lost."""

import json
import random
import signal
import time
from typing import NamedTuple

import psutil
from launching import Outcome, Run, Setting
from workspace import Workspace

from qloop.checkpoint.store import CheckpointStore
from qloop.storage.filesystem import FileSystem

STEPS = 40
SECONDS_TO_LEAVE = 30
# Every step is saved, by both ranks, so that most kills fall into a save.
KEYS = {"max_steps": STEPS, "save_steps": 1, "share_above_gb": 0, "log_steps": 1000}


class Death(NamedTuple):
    """What became of a run that lost a rank."""

    engine: str
    rank: int
    fault: str
    seconds: float
    """Until the last process that trains had left."""
    in_save: bool
    """Whether a checkpoint was being written."""
    failure: str
    """What did not hold, or nothing."""


class Curves:
    """What undisturbed runs of each engine make; to the last digit, since gloo on a CPU repeats."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._curves: dict[str, list[tuple]] = {}

    def get(self, engine: str) -> list[tuple]:
        if engine not in self._curves:
            run = Run(self.workspace, f"undisturbed-{engine}", **KEYS)
            run.start(Setting(engine, 2))
            self._curves[engine] = read_curve(run)
        return self._curves[engine]


def read_curve(run: Run) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["tokens_seen"]) for r in run.read_metrics()]


def kill_one(curves: Curves, engine: str, rank: int, at_step: int, fault: str = "") -> Death:
    """Kills a rank at a step, looks at what the others do, and goes on by the same command."""
    name = f"killed-{engine}-{rank}-{at_step}{fault}"
    run = Run(curves.workspace, name, **KEYS)
    setting = Setting(engine, 2)
    process = run.spawn(setting, fault=fault)
    wait_for_step(run, at_step)
    ranks = find_ranks(run)
    assert sorted(ranks) == [0, 1], ranks
    time.sleep(random.Random(name).random() / 10)  # anywhere in a step
    started = time.monotonic()
    ranks.pop(rank).send_signal(signal.SIGKILL)
    psutil.wait_procs(list(ranks.values()), timeout=SECONDS_TO_LEAVE + 30)
    seconds = time.monotonic() - started
    text = run.wait(process).text
    in_save = any((run.folder / "checkpoints").glob(".unfinished-*"))
    failure = find_failure(curves, run, setting, seconds, text)
    return Death(engine, rank, fault, seconds, in_save, failure)


def find_failure(curves: Curves, run: Run, setting: Setting, seconds: float, text: str) -> str:
    """Gives what did not hold, or nothing."""
    if seconds > SECONDS_TO_LEAVE:
        return f"the others left after {seconds:.0f} s: {text[-800:]}"
    if "has ended, and no other process can go on without it" not in text:
        return f"no message: {text[-1500:]}"
    harm = find_harm(run)
    if harm:
        return harm
    run.start(setting)
    return "" if read_curve(run) == curves.get(setting.engine) else "another curve"


def find_harm(run: Run) -> str:
    """Looks at every checkpoint that carries the name of one."""
    store = CheckpointStore(run.folder / "checkpoints", FileSystem())
    for path in store.list_checkpoints():
        store.verify(path)
    return f"moved aside: {store.list_damaged()}" if store.list_damaged() else ""


def wait_for_step(run: Run, step: int, seconds: float = 120) -> None:
    file = run.folder / "logs/metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not file.exists() or file.read_text().count("\n") < step:
        assert time.monotonic() < deadline, "no steps are made"
        time.sleep(0.005)


def find_ranks(run: Run) -> dict[int, psutil.Process]:
    """Finds the processes that train."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if run.name in words and "accelerate.commands.launch" not in words:
            found[int(process.environ()["RANK"])] = process
    return found


def try_fault(workspace: Workspace, engine: str, fault: str, **keys) -> tuple[Run, Outcome]:
    """Runs with a fault on one of two ranks, to whatever end."""
    name = "-".join([fault, engine, *map(str, keys.values())]).replace("/", "_")[:60]
    run = Run(workspace, name, **{**KEYS, **keys})
    outcome = run.wait(run.spawn(Setting(engine, 2), fault=fault), seconds=120)
    assert not find_ranks(run), "a process is left"
    return run, outcome


def read_status(run: Run) -> dict:
    return dict(json.loads((run.folder / "status.json").read_text()))
