"""Signals at random moments to real commands: one process, the launcher, two processes.

The run must be saved after the last step that it reports, no process of it may stay, and the same
command must finish it to the very curve of a run that nobody disturbed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
from kills import find_harm, folder_of, read_run
from rows import Row
from workspace import Workspace

STEPS = 400
LAUNCHER = "accelerate.commands.launch"
ONE = [sys.executable]
ALONE = [sys.executable, "-m", LAUNCHER, "--cpu", "--num_processes", "1"]
TWO = [sys.executable, "-m", LAUNCHER, "--multi_gpu", "--num_processes", "2"]
ALONE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TWO += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


class Trial(NamedTuple):
    """A command and what is done to it."""

    name: str
    launcher: list[str]
    hit: Callable[["Run", random.Random], None]
    wanted: str
    """`stopped`, `finished` (a save on the way), or `left` (at once, without a save)."""
    code: int | None
    """Exit code of the first process, where it is known."""
    signals: str = ""
    """What the launcher is told to pass on."""


class Run:
    """A started command."""

    def __init__(self, workspace: Workspace, name: str, trial: Trial) -> None:
        self.config = workspace.make_config(experiment_name=name, **KEYS)
        self.flags = workspace.flags(experiment_name=name, **KEYS)
        self.trial = trial
        self.log = workspace.folder / f"{name}.log"

    def start(self) -> subprocess.Popen:
        words = ["-m", "qloop", "train"]
        words += [word for key, value in self.flags.items() for word in (f"--{key}", value)]
        passed_on = {"PET_SIGNALS_TO_HANDLE": self.trial.signals} if self.trial.signals else {}
        with self.log.open("a") as log:
            return subprocess.Popen(
                [*self.trial.launcher, *words],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": ":".join(sys.path), **passed_on},
                start_new_session=True,
                # A shell makes its background jobs, and all they start, deaf to Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def metrics(self) -> Path:
        return folder_of(self.config) / "logs/metrics.jsonl"

    def wait_for_step(self, step: int) -> None:
        """Waits until a step is reported."""
        deadline = time.monotonic() + 120
        while not self.metrics.exists() or self.metrics.read_text().count("\n") < step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def processes(self) -> list[psutil.Process]:
        """Gives every process of the run, known by its experiment's name."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if str(self.config.run.experiment_name) in words and process.pid != os.getpid():
                found.append(process)
        return found

    def trainers(self) -> list[psutil.Process]:
        """Gives the processes that train, without the launcher."""
        return [p for p in self.processes() if LAUNCHER not in p.info["cmdline"]]


KEYS = {"max_steps": STEPS, "save_steps": 50, "eval_steps": 0, "log_steps": 100}


def at_random(signal_number: int) -> Callable[[Run, random.Random], None]:
    """Signals the process that a person sees, some time after the first steps."""

    def hit(run: Run, rng: random.Random) -> None:
        run.wait_for_step(rng.randrange(1, STEPS // 2))
        run.process.send_signal(signal_number)

    return hit


def to_a_trainer(run: Run, rng: random.Random) -> None:
    """Asks one training process for a checkpoint."""
    run.wait_for_step(rng.randrange(1, STEPS // 2))
    rng.choice(run.trainers()).send_signal(signal.SIGUSR1)


def twice(run: Run, rng: random.Random) -> None:
    """Ctrl-C, and again before the first one can be obeyed."""
    run.wait_for_step(rng.randrange(1, STEPS // 2))
    run.process.send_signal(signal.SIGSTOP)
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGCONT)
    run.process.send_signal(signal.SIGINT)


def while_loading(run: Run, rng: random.Random) -> None:
    """As soon as the run has its lock, which is before anything is read."""
    deadline = time.monotonic() + 60
    while not (folder_of(run.config) / ".lock").exists():
        assert time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.005)
    run.process.send_signal(signal.SIGTERM)


PLAIN = [
    Trial("SIGTERM", ONE, at_random(signal.SIGTERM), "stopped", 75),
    Trial("SIGINT", ONE, at_random(signal.SIGINT), "stopped", 75),
    Trial("SIGUSR1", ONE, to_a_trainer, "finished", 0),
    Trial("SIGINT twice", ONE, twice, "left", None),
    Trial("SIGTERM while loading", ONE, while_loading, "left", 75),
]


def try_stop(run: Run, seed: str) -> str:
    """Starts, hits, looks, finishes; gives what is wrong, or nothing."""
    trial = run.trial
    run.process = run.start()
    trial.hit(run, random.Random(seed))
    try:
        code = run.process.wait(timeout=90)
    except subprocess.TimeoutExpired:
        return f"the first process is still there: {run.log.read_text()[-500:]}"
    deadline = time.monotonic() + 30
    while run.processes():
        if time.monotonic() > deadline:
            left = [process.info["cmdline"][:4] for process in run.processes()]
            for process in run.processes():
                process.kill()
            return f"processes left: {left}"
        time.sleep(0.05)
    if trial.code is not None and code != trial.code:
        return f"exit code {code}: {run.log.read_text()[-500:]}"
    return find_loss(run) or finish_again(run)


def find_loss(run: Run) -> str:
    """Looks at what a stopped run left; gives what is wrong with it, or nothing."""
    folder, wanted = folder_of(run.config), run.trial.wanted
    if wanted == "left":
        return find_harm(run.config) if (folder / "checkpoints").exists() else ""
    status = json.loads((folder / "status.json").read_text())
    if status["state"] not in wanted:
        return f"status.json: {status}; {run.log.read_text()[-500:]}"
    last = json.loads(run.metrics.read_text().splitlines()[-1])["step"]
    saved = [int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir()]
    if max(saved) != last or status["step"] != last:
        return f"step {last} is the last, {max(saved)} is saved, status.json says {status}"
    if "SIGUSR1" in run.trial.name and status["state"] == "finished":
        odd = [line for line in run.log.read_text().splitlines() if line.startswith("saved ")]
        steps = [int(line.split("checkpoint-")[1].split()[0]) for line in odd]
        if all(step % KEYS["save_steps"] == 0 for step in steps):
            return f"no save between those that are due: {steps}"
    return find_harm(run.config)


def finish_again(run: Run) -> str:
    """Types the same command again, and compares with the undisturbed run."""
    if run.start().wait(timeout=180):
        return f"the second start failed: {run.log.read_text()[-800:]}"
    progress = folder_of(run.config) / f"checkpoints/checkpoint-{STEPS}/progress.json"
    wanted_processes = 2 if "2" in run.trial.launcher else 1
    if json.loads(progress.read_text())["num_processes"] != wanted_processes:
        return "ran on another number of processes"
    undisturbed = read_undisturbed(run, wanted_processes)
    if read_run(run.config, STEPS) != undisturbed:
        return "another curve or other tensors"
    shutil.rmtree(folder_of(run.config))
    return ""


_UNDISTURBED: dict[int, tuple] = {}


def read_undisturbed(run: Run, num_processes: int) -> tuple:
    """Runs once for each number of processes without a signal."""
    if num_processes not in _UNDISTURBED:
        launcher = TWO if num_processes == 2 else ONE
        trial = Trial("none", launcher, at_random(0), "finished", 0)
        name = f"undisturbed-{num_processes}"
        other = Run(
            Workspace(run.log.parent, run.config.data.train_file, TOKENIZER[0]), name, trial
        )
        assert other.start().wait(timeout=180) == 0, other.log.read_text()
        _UNDISTURBED[num_processes] = read_run(other.config, STEPS)
    return _UNDISTURBED[num_processes]


TOKENIZER: list[Path] = []


def run_stops(workspace: Workspace, title: str, trials: list[Trial], times: int, seed: int) -> Row:
    """Makes each trial some times."""
    TOKENIZER[:] = [workspace.tokenizer]
    survived, first_failure = 0, ""
    for number in range(times * len(trials)):
        trial = trials[number % len(trials)]
        name = f"{title.split()[0]}-{len(trial.launcher)}-{number}"
        failure = try_stop(Run(workspace, name, trial), f"{seed}-{number}")
        survived += not failure
        if failure and not first_failure:
            first_failure = f"seed {seed}-{number}, {trial.name}: {failure}"
    return Row(
        f"signals to {title}",
        times * len(trials),
        survived,
        "saved after its last step, no process left, finished later to the same last bit",
        ", ".join(trial.name for trial in trials),
        first_failure=first_failure,
    )


def run(workspace: Workspace, is_short: bool) -> list[Row]:
    """One process without a launcher; short: a single stop."""
    trials, times = (PLAIN[:1], 1) if is_short else (PLAIN, 4)
    return [run_stops(workspace, "one process", trials, times, seed=7)]
