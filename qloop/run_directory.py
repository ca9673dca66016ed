"""The folder of a run: its paths, and the check that it holds no other run.

output/<experiment_name, or the model's short name>/
  config.yaml     the config that ran; `--config` takes it
  checkpoints/    checkpoint-N, each complete
  logs/           training_log.txt, metrics.jsonl, eval_results.json, data_report.json
  results/        the final evaluation, samples, loss.png
  status.json     state, step, reason
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from qloop.config.keys import Config, find_changes
from qloop.config.loading import dump_yaml, load_config
from qloop.errors import ConfigError
from qloop.storage.filesystem import FileSystem

# What a run may leave that ends before its config.yaml has its name.
_BEFORE_CONFIG = {".lock", ".config.yaml.tmp"}


class RunDirectory:
    """Paths of a run's files; the folders exist once they are created."""

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
        """Makes sure that the folder is new, or this config's.

        Raises:
            ConfigError: It holds another run, shown by what differs, or something that is no run.
        """
        if self.config.exists():
            changes = find_changes(load_config(self.config, {}).config, config)
            if changes:
                shown = "\n  ".join(changes)
                raise ConfigError(
                    f"{self.path}: holds another run, with other settings:\n  {shown}\n"
                    "give another --experiment_name to start a new run, its settings to go on, or "
                    f"name the keys that may change: --allow_change "
                    f"{','.join(change.split(':')[0] for change in changes)}"
                )
            if config.run.resume == "never":
                raise ConfigError(
                    f"{self.path}: holds a run already, and resume is never; give another "
                    "--experiment_name, or --resume auto to go on with it"
                )
        elif self.path.exists() and {*os.listdir(self.path)} - _BEFORE_CONFIG:
            raise ConfigError(
                f"{self.path}: is in use, but has no config.yaml, so it is no run of qloop; give "
                "another --experiment_name or --output_dir"
            )

    def create(self, config: Config) -> None:
        """Makes the folders, and writes the config that runs.

        Raises:
            OSError: The disk refuses.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, dump_yaml(config))
        for folder in (self.checkpoints, self.logs, self.results):
            folder.mkdir(exist_ok=True)
        # A checkpoint is no safer than the names of the folders it lies in.
        for folder in (self.path, self.path.parent):
            FileSystem().sync_folder(folder)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after a step lies."""
        return self.checkpoints / f"checkpoint-{step}"

    def write_status(self, state: str, step: int, reason: str = "") -> None:
        """Says in status.json that the run is running, finished, stopped, diverged or failed."""
        write_atomically(
            self.status, json.dumps({"state": state, "step": step, "reason": reason}) + "\n"
        )


def locate_run(config: Config) -> RunDirectory:
    """Names the run's folder.

    Raises:
        ConfigError: The model's name makes no folder name, or the folder lies elsewhere.
    """
    name = config.run.experiment_name
    if name is None:
        file = config.model.model_config_file
        name = file.stem if file else Path(config.model.model_name).name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ConfigError(
                f'experiment_name: the model\'s short name "{name}" makes no folder name; give one'
            )
    run = RunDirectory(config.run.output_dir / name)
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"{run.path}: is no folder; give another --experiment_name")
    inside = config.run.output_dir.resolve()
    for path in (run.path, run.checkpoints, run.logs, run.results):
        if not path.resolve().is_relative_to(inside):
            raise ConfigError(
                f"{path}: is a link to {path.resolve()}, outside of output_dir {inside}; nothing "
                "is written there; give that folder as --output_dir, or another --experiment_name"
            )
    return run


def write_atomically(file: Path, text: str) -> None:
    """Replaces a file's content: a reader, or a crash, sees the old or the new, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def write_json(file: Path, content: Any) -> None:
    """Writes JSON that a person can read."""
    write_atomically(file, json.dumps(content, indent=2) + "\n")
