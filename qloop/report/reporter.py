"""All reports of a run in one object, which does nothing on ranks other than the main one."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from qloop.config.keys import Config
from qloop.errors import CheckpointError
from qloop.evaluation.completions import Sample
from qloop.evaluation.held_out import Evaluation
from qloop.report.console import Console
from qloop.report.files import EvalResultsFile, open_metrics, read_records
from qloop.report.metrics import StepRecord
from qloop.report.plot import plot_losses
from qloop.report.trackers import Trackers
from qloop.run_directory import RunDirectory
from qloop.storage.folders import write_atomically, write_json


class Reporter:
    """Reports to the console, the log files and the trackers; cuts the files back to `step`."""

    def __init__(
        self, run: RunDirectory, config: Config, step: int, last_step: int, is_main: bool
    ) -> None:
        self.is_main = is_main
        if not is_main:
            return
        self._run = run
        self._console = Console(run.training_log, config.report.log_steps, last_step)
        self._metrics = open_metrics(run.metrics, step, self.say)
        self._evaluations = EvalResultsFile(run.eval_results, step)
        self._trackers = Trackers(
            config.report, run.logs, run.path.name, config.model_dump(mode="json"), step, self.say
        )

    def say(self, message: str) -> None:
        """Prints and logs a message."""
        if self.is_main:
            self._console.say(message)

    def write_step(self, record: StepRecord) -> None:
        """Reports a step."""
        if self.is_main:
            values = dataclasses.asdict(record)
            self._metrics.write(json.dumps(values) + "\n")
            self._console.show_step(record)
            step = values.pop("step")
            known = {f"train/{name}": x for name, x in values.items() if x is not None}
            self._trackers.write(step, known)

    def flush(self) -> None:
        """Retries steps that the disk refused, before a save relies on them."""
        if self.is_main:
            self._metrics.write()

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Reports held-out results."""
        if self.is_main:
            values = dataclasses.asdict(evaluation)
            with self._reporting_disk_errors():
                self._evaluations.write(step, values)
            self._trackers.write(step, {f"held_out/{name}": x for name, x in values.items()})
            self.say(
                f"held out after step {step}: loss {evaluation.loss:.4f}, perplexity "
                f"{evaluation.perplexity:.2f}, {evaluation.bits_per_byte:.4f} bits per byte, "
                f"{evaluation.token_accuracy:.1%} of tokens right"
            )

    def write_results(self, samples: list[Sample]) -> None:
        """Writes the results folder.

        Raises:
            CheckpointError: The disk refuses.
        """
        if not self.is_main:
            return
        folder, evaluations = self._run.results, self._evaluations.results
        try:
            if evaluations:
                ends = {"first": evaluations[0], "final": evaluations[-1]}
                write_json(folder / "evaluation.json", ends)
            if samples:
                write_atomically(folder / "samples.md", _format_samples(samples))
            records = read_records(self._run.metrics)
            plot_losses(records, evaluations, self._run.path.name, folder / "loss.png")
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be written: {error}; the model is saved; make room and type "
                "the same command again"
            ) from error

    def say_farewell(self, step: int, checkpoint: Path, next_lines: list[str]) -> None:
        """Prints the results, the place of every file, and the commands to type next."""
        if not self.is_main:
            return
        lines = [f"finished after step {step}"]
        if self._evaluations.results:
            first, last = self._evaluations.results[0], self._evaluations.results[-1]
            lines.append(
                f"held-out loss {first['loss']:.4f} -> {last['loss']:.4f}, bits per byte "
                f"{first['bits_per_byte']:.4f} -> {last['bits_per_byte']:.4f}"
            )
        lines += [
            f"  model    {checkpoint}",
            f"  results  {self._run.results}  (evaluation.json, samples.md, loss.png)",
            f"  logs     {self._run.logs}  (training_log.txt, metrics.jsonl, eval_results.json, "
            "data_report.json)",
            "next:",
            *next_lines,
        ]
        self.say("\n".join(lines))

    def write_status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json."""
        if self.is_main:
            with self._reporting_disk_errors():
                self._run.write_status(state, step, reason)

    @contextlib.contextmanager
    def _reporting_disk_errors(self) -> Iterator[None]:
        """Reports a failed write and goes on: each later write replaces the whole file."""
        try:
            yield
        except OSError as error:
            self.say(f"{error.filename or self._run.path}: not written: {error.strerror}")

    def close(self) -> None:
        """Closes all reports."""
        if self.is_main:
            self._trackers.close()
            self._metrics.close()
            self._console.close()


def _format_samples(samples: list[Sample]) -> str:
    parts = ["# Completions of held-out documents\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"## {number}\n")
        for title, text in (
            ("given", sample.prefix),
            ("the model continues", sample.completion),
            ("the document continues", sample.truth),
        ):
            # Four backticks, since Q code itself may contain three.
            parts.append(f"{title}:\n\n````q\n{text}\n````\n")
    return "\n".join(parts)
