"""Files that programs read: nothing twice after a restart, nothing lost on a full disk."""

import errno
import json
import math
from pathlib import Path

import pytest

from qloop.report.files import EvalResultsFile, LineFile, open_metrics, read_records


def write_losses(file: Path, after_step: int, losses: dict[int, float]) -> None:
    metrics = open_metrics(file, after_step, pytest.fail)
    for step, loss in losses.items():
        metrics.write(json.dumps({"step": step, "loss": loss}) + "\n")
    metrics.close()


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write_losses(file, 0, {1: 2.5, 2: 2.5, 3: 2.5})
    write_losses(file, 2, {3: 9.0})
    assert [(r["step"], r["loss"]) for r in read_records(file)] == [(1, 2.5), (2, 2.5), (3, 9.0)]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_records(file) == [{"step": 1, "loss": 2.0}]
    write_losses(file, 1, {})
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_losses_survive_the_file_to_the_last_bit(tmp_path):
    """Also when the file is cut back."""
    write_losses(tmp_path / "m.jsonl", 0, {1: math.pi / 3})
    write_losses(tmp_path / "m.jsonl", 1, {})
    assert read_records(tmp_path / "m.jsonl")[0]["loss"] == math.pi / 3


def test_held_out_results_are_cut_back_and_never_twice(tmp_path):
    file = tmp_path / "eval_results.json"
    results = EvalResultsFile(file, after_step=0)
    for step in (0, 50, 100):
        results.write(step, {"loss": float(step)})
    resumed = EvalResultsFile(file, after_step=50)
    resumed.write(50, {"loss": -1.0})
    assert json.loads(file.read_text()) == [
        {"step": 0, "loss": 0.0},
        {"step": 50, "loss": -1.0},
    ]


class RefusingStream:
    """Takes some bytes, then refuses as a full disk does, maybe in the middle of a line."""

    def __init__(self, stream, room: int) -> None:
        self.stream = stream
        self.room = room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.stream.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self) -> None:
        self.stream.close()


@pytest.mark.parametrize("room", range(0, 12))
def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, room):
    told: list[str] = []
    lines = LineFile(tmp_path / "m.jsonl", told.append)
    lines._stream = RefusingStream(lines._stream, room)
    for text in ("one\n", "two\n", "three\n"):
        lines.write(text)
    assert len(told) == 1
    assert told[0].endswith("No space left on device; its lines are kept in memory")
    lines._stream.room = 1000
    lines.close()
    assert (tmp_path / "m.jsonl").read_text() == "one\ntwo\nthree\n"
    assert told[1].endswith("the lines kept in memory are written")
