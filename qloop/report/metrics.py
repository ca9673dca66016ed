"""Files that a program reads: one JSON line per step, and the held-out results."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qloop.progress import Progress
from qloop.report.lines import LineFile
from qloop.run_directory import write_atomically, write_json


@dataclass(frozen=True)
class StepRecord:
    """All that is known of a step; a line of metrics.jsonl."""

    step: int
    loss: float
    """Nats per target, over the whole step and all ranks."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    target_tokens: int
    tokens_seen: int
    blocks_seen: int
    epoch: float
    data_seconds: float
    forward_backward_seconds: float
    update_seconds: float
    tokens_per_second: float
    """Targets of all ranks over the step's seconds."""
    peak_memory_bytes: int
    """Of the GPU so far; 0 on a CPU."""


def build_step_record(
    progress: Progress,
    loss: float,
    learning_rate: float,
    grad_norm: float,
    target_tokens: int,
    num_blocks: int,
    times: tuple[float, float, float, float],
) -> StepRecord:
    """Builds the record of the step that `progress` has just accounted for.

    Args:
        progress: After the step.
        loss: Nats per target.
        learning_rate: The step's.
        grad_norm: Before clipping.
        target_tokens: The step's, over all ranks.
        num_blocks: Blocks of an epoch.
        times: Clock at the start, when the data was there, the gradients, and the new weights.
    """
    started, fetched, computed, updated = times
    return StepRecord(
        step=progress.step,
        loss=loss,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        target_tokens=target_tokens,
        tokens_seen=progress.tokens_seen,
        blocks_seen=progress.blocks_seen,
        epoch=progress.blocks_seen / num_blocks,
        data_seconds=fetched - started,
        forward_backward_seconds=computed - fetched,
        update_seconds=updated - computed,
        tokens_per_second=target_tokens / (updated - started),
        peak_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    )


class MetricsFile:
    """metrics.jsonl: every line is on its way to the disk when its step ends."""

    def __init__(self, file: Path, after_step: int, complain: Callable[[str], None]) -> None:
        """Cuts the file back to a step, so that none appears twice, and goes on behind it."""
        lines = [
            json.dumps(record) for record in read_records(file) if record["step"] <= after_step
        ]
        write_atomically(file, "".join(f"{line}\n" for line in lines))
        self._lines = LineFile(file, complain)

    def write(self, record: StepRecord) -> None:
        """Appends a line."""
        self._lines.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def close(self) -> None:
        """Ends the file."""
        self._lines.close()

    def flush(self) -> None:
        """Tries again to write what the disk refused."""
        self._lines.write("")


def read_records(file: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line that a crash cut short is left out."""
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class EvalResultsFile:
    """eval_results.json: a list of the held-out results by step."""

    def __init__(self, file: Path, after_step: int) -> None:
        """Cuts the list back to a step."""
        self._file = file
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self.results: list[dict[str, Any]] = [r for r in before if r["step"] <= after_step]

    def write(self, step: int, result: dict[str, Any]) -> None:
        """Appends a result, in place of an older one of the same step."""
        self.results = [r for r in self.results if r["step"] != step]
        self.results.append({"step": step, **result})
        write_json(self._file, self.results)
