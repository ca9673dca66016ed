"""Starts tiny runs under each engine, by the very files of launch/, and reads what they made."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from workspace import Workspace

ROOT = Path(__file__).parents[2]
ON_CPU = ROOT / "tests/distributed/on_cpu.py"

# The launcher's file, and what the opening lines call the engine.
ENGINES = {
    "DDP": "cpu_two_processes.yaml",
    "FSDP2": "fsdp2.yaml",
    "ZeRO-2": "deepspeed_zero2.yaml",
    "ZeRO-3": "deepspeed_zero3.yaml",
}
STEP_BLOCKS = 8
KEYS = {"batch_size": 1, "save_steps": 1000, "eval_steps": 0, "learning_rate": "3e-3"}


class Setting(NamedTuple):
    """An engine on a number of processes."""

    engine: str
    """A key of ENGINES; "" for one process without a launcher."""
    num_processes: int

    def __str__(self) -> str:
        return f"{self.engine or 'one process'}{f' x {self.num_processes}' * bool(self.engine)}"


ONE = Setting("", 1)


class Run:
    """A run in a workspace; `start` may be called again to go on with it."""

    def __init__(self, workspace: Workspace, name: str, method: str = "full", **keys: Any) -> None:
        """Takes keys of the config beside KEYS; the step has STEP_BLOCKS blocks."""
        self.workspace, self.name = workspace, name
        self.folder = workspace.folder / "output" / name
        self.keys = {**KEYS, "experiment_name": name, **workspace.method_keys(method), **keys}

    def command(self, setting: Setting, fault: str = "", **keys: Any) -> list[str]:
        accumulation = STEP_BLOCKS // setting.num_processes
        flags = {"gradient_accumulation_steps": accumulation, **self.keys, **keys}
        words = [w for k, v in self.workspace.flags(**flags).items() for w in (f"--{k}", v)]
        if not setting.engine:
            return [sys.executable, "-m", "qloop", "train", *words]
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        launcher += ["--config_file", str(self._launch_file(setting.engine))]
        launcher += ["--num_processes", str(setting.num_processes), "--main_process_port", "0"]
        program = ["-m", "qloop"] if setting.engine == "DDP" else [str(ON_CPU)]
        if fault:
            program = [str(ON_CPU.with_name("faults.py")), fault]
        return [*launcher, *program, "train", *words]

    def _launch_file(self, engine: str) -> Path:
        """Finds the launcher's file; for "... offload" with its commented keys turned on."""
        file = ROOT / "launch" / ENGINES[engine.removesuffix(" offload")]
        if not engine.endswith(" offload"):
            return file
        changed = self.workspace.folder / f"offload_{file.name}"
        changed.write_text(file.read_text().replace("# offload_", "offload_"))
        return changed

    def start(self, setting: Setting, **keys: Any) -> "Outcome":
        """Runs to its end; fails if that is no good one, or not by that many processes."""
        outcome = self.wait(self.spawn(setting, **keys))
        assert outcome.code == 0, outcome.text[-4000:]
        engine = setting.engine.removesuffix(" offload")
        name = f", {engine})" if engine else "cpu x 1)"
        assert name in outcome.text, outcome.text
        assert self.read_progress()["num_processes"] == setting.num_processes
        return outcome

    def spawn(self, setting: Setting, fault: str = "", **keys: Any) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(setting, fault, **keys),
            cwd=self.workspace.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )

    def wait(self, process: subprocess.Popen, seconds: float = 240) -> "Outcome":
        killer = threading.Timer(seconds, lambda: os.killpg(process.pid, 9))
        killer.start()
        text, _ = process.communicate()
        killer.cancel()
        return Outcome(process.returncode, text)

    def copy(self, name: str) -> "Run":
        """Gives a run of another name that has come as far."""
        other = Run.__new__(Run)
        other.__dict__.update(self.__dict__, name=name, folder=self.folder.with_name(name))
        other.keys = {**self.keys, "experiment_name": name}
        shutil.copytree(self.folder, other.folder)
        return other

    def read_metrics(self) -> list[dict[str, Any]]:
        file = self.folder / "logs/metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def read_held_out(self) -> list[dict[str, float]]:
        return list(json.loads((self.folder / "logs/eval_results.json").read_text()))

    def read_progress(self) -> dict[str, Any]:
        return dict(json.loads((self.newest() / "progress.json").read_text()))

    def newest(self) -> Path:
        found = (self.folder / "checkpoints").glob("checkpoint-*")
        return max(found, key=lambda path: int(path.name.split("-")[1]))


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    text: str


def write_uneven_corpus(workspace: Workspace) -> Path:
    """Writes documents whose prompts, long and short, are no targets: some blocks have none."""
    file = workspace.folder / "uneven.jsonl"
    with file.open("w") as stream:
        for number, source in enumerate(sorted(workspace.corpus.glob("*.q"))):
            text = source.read_text()
            cut = len(text) * (number % 4) // 4
            stream.write(json.dumps({"prompt": text[:cut], "completion": text[cut:]}) + "\n")
    return file


def largest_difference(ours: list[dict], theirs: list[dict], key: str) -> float:
    """Compares a figure over two lists of records of equal length."""
    assert len(ours) == len(theirs)
    return max(abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=True))
