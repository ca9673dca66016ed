"""Weights & Biases and TensorBoard; neither can end or change a run."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qloop.config.keys import ReportConfig
from qloop.errors import ConfigError

Say = Callable[[str], None]


class Trackers:
    """The trackers that the config turns on; one that fails is reported and dropped."""

    def __init__(
        self,
        config: ReportConfig,
        logs: Path,
        name: str,
        settings: dict[str, Any],
        step: int,
        say: Say,
    ) -> None:
        """Starts the trackers.

        Args:
            config: The config's section.
            logs: Folder for their files.
            name: Name of the run.
            settings: The whole config, which W&B shows.
            step: Updates made so far.
            say: Prints a message.

        Raises:
            ConfigError: The package of a tracker is not installed.
        """
        self._say = say
        self._trackers: list[_TensorBoard | _Wandb] = []
        if config.tensorboard:
            self._start(lambda: _TensorBoard(logs / "tensorboard", step))
        if config.wandb:
            self._start(lambda: _Wandb(config.wandb_project, logs, name, settings, say))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends the values of a step, by name: `train/loss`."""
        self._each(lambda tracker: tracker.write(step, values))

    def close(self) -> None:
        """Closes the trackers."""
        self._each(lambda tracker: tracker.close())

    def _start(self, build: "Callable[[], _TensorBoard | _Wandb]") -> None:
        try:
            self._trackers.append(build())
        except ConfigError:
            raise
        except Exception as error:  # a tracker's client may raise anything; training goes on
            kind = type(error).__name__
            self._say(f"a tracker could not start and is turned off: {kind}: {error}")

    def _each(self, act: "Callable[[_TensorBoard | _Wandb], None]") -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # as above
                self._trackers.remove(tracker)
                self._say(f"{tracker.name} failed and is turned off: {error}")


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "tensorboard: the package is missing; pip install tensorboard"
            ) from error
        # Hides what an interrupted part wrote after the restored step.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    name = "Weights & Biases"

    def __init__(
        self, project: str, logs: Path, name: str, settings: dict[str, Any], say: Say
    ) -> None:
        import wandb

        # One id for all parts of a run, so that W&B shows them as one.
        id_file = logs / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        options: dict[str, Any] = {
            "project": project,
            "name": name,
            "id": id_file.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "config": settings,
            "dir": str(logs),
            "settings": wandb.Settings(silent=True),
        }
        # W&B's default of 90 seconds would block the run.
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "20")
        try:
            self._run = wandb.init(**options)
        except Exception as error:
            # Its service keeps trying, and would refuse the id a second time.
            wandb.teardown()
            self._run = wandb.init(**options, mode="offline")
            say(
                f"W&B cannot be reached ({error}); this part is written to {logs / 'wandb'}; "
                f"send it later: wandb sync {logs / 'wandb'}/offline-run-*"
            )
        # W&B's own counter cannot go back; the step of a resumed run can.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
