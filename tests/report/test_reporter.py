"""Reports: nothing twice after a restart, and no tracker that can end a run."""

import dataclasses
import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console as RichConsole

from qloop.config.loading import dump_yaml
from qloop.data.packing import pack_wrapped
from qloop.errors import CheckpointError, ConfigError
from qloop.model.flops import Flops, ModelFlops
from qloop.report.console import Console
from qloop.report.files import EvalResultsFile, LineFile, MetricsFile, read_records
from qloop.report.metrics import Meter, StepRecord
from qloop.report.plot import plot_losses
from qloop.report.reporter import Reporter
from qloop.run_directory import RunDirectory
from qloop.steps import Progress
from qloop.train import train


def make_record(step: int, loss: float = 2.5, **values: float | None) -> StepRecord:
    record = StepRecord(
        step=step,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.5,
        target_tokens=100,
        tokens_seen=100 * step,
        blocks_seen=4 * step,
        epoch=0.1 * step,
        data_seconds=0.01,
        forward_backward_seconds=0.2,
        update_seconds=0.03,
        tokens_per_second=400.0,
        padding_share=0.05,
        flops_per_second=4e12,
        mfu=0.414,
        memory_bytes=20_000_000_000,
        peak_memory_bytes=23_440_000_000,
        reserved_memory_bytes=25_000_000_000,
    )
    return dataclasses.replace(record, **values)


def test_metrics_are_cut_back_to_the_restored_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    first = MetricsFile(file, after_step=0, say=pytest.fail)
    for step in (1, 2, 3):
        first.write(make_record(step))
    first.close()
    second = MetricsFile(file, after_step=2, say=pytest.fail)
    second.write(make_record(3, loss=9.0))
    second.close()
    assert [(r["step"], r["loss"]) for r in read_records(file)] == [(1, 2.5), (2, 2.5), (3, 9.0)]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_records(file) == [{"step": 1, "loss": 2.0}]
    MetricsFile(file, after_step=1, say=pytest.fail).close()
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_losses_survive_the_file_to_the_last_bit(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl", after_step=0, say=pytest.fail)
    metrics.write(make_record(1, loss=math.pi / 3))
    metrics.close()
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


def test_a_step_line_names_step_loss_rate_norm_and_speed(tmp_path, capsys):
    console = Console(tmp_path / "log.txt", log_steps=1, last_step=20)
    console.show_step(make_record(1))
    console.show_step(make_record(2))
    console.close()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "step  1/20  loss 2.5000  rate 1.00e-04  norm 0.500  400 tokens/s  MFU 41%  23.4 GB"
    )
    assert lines[1].startswith(lines[0].replace(" 1/20", " 2/20"))
    assert lines[1].endswith(" left")


def test_a_model_whose_flops_are_unknown_has_no_mfu_in_its_line(tmp_path, capsys):
    console = Console(None, log_steps=1, last_step=20)
    console.show_step(make_record(1, mfu=None, flops_per_second=None))
    console.close()
    assert capsys.readouterr().out.endswith("norm 0.500  400 tokens/s  23.4 GB\n")


def test_plain_lines_come_every_log_steps_and_at_the_end(tmp_path, capsys):
    console = Console(tmp_path / "log.txt", log_steps=4, last_step=9)
    for step in range(1, 10):
        console.show_step(make_record(step))
    console.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in printed] == ["step 4", "step 8", "step 9"]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_a_terminal_gets_one_live_line_and_messages_above_it():
    console = Console(None, log_steps=100, last_step=9)
    screen = io.StringIO()
    console._rich = RichConsole(file=screen, force_terminal=True, width=120)
    console.show_step(make_record(1))
    console.say("saved somewhere")
    console.show_step(make_record(2))
    console.close()
    text = screen.getvalue()
    assert "\x1b[" in text
    assert text.index("saved somewhere") < text.rindex("step 2/9")


def test_the_log_is_appended_to_and_stamped(tmp_path):
    for message in ("first", "second\nthird"):
        console = Console(tmp_path / "log.txt", 1, 1)
        console.say(message)
        console.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["first", "second", "third"]
    assert lines[0][:4].isdigit()


def test_the_plot_is_a_picture(tmp_path):
    evaluations = [{"step": s, "loss": 3.0 - s, "bits_per_byte": 1.0} for s in (0, 1)]
    records = [{"step": step, "loss": 2.0, "epoch": step / 4} for step in (1, 2)]
    plot_losses(records, evaluations, "run", tmp_path / "loss.png")
    plot_losses(records, [], "run without held-out documents", tmp_path / "alone.png")
    plot_losses([], evaluations[:1], "run without a step", tmp_path / "untrained.png")
    for name in ("loss.png", "alone.png", "untrained.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_writes_every_file_of_its_directory(make_config):
    config = make_config(num_samples=2, sample_tokens=4)
    train(config, [])
    run = config.run.output_dir / "run"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "status.json",
        "logs/training_log.txt",
        "logs/metrics.jsonl",
        "logs/eval_results.json",
        "logs/data_report.json",
        "results/evaluation.json",
        "results/samples.md",
        "results/loss.png",
        "checkpoints/checkpoint-3/model.safetensors",
        "checkpoints/checkpoint-6/optimizer.safetensors",
    } <= files
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    evaluations = json.loads((run / "logs/eval_results.json").read_text())
    assert [entry["step"] for entry in evaluations] == [0, 3, 6]
    record = json.loads((run / "logs/metrics.jsonl").read_text().splitlines()[0])
    assert set(record) == set(StepRecord.__dataclass_fields__)


def make_meter(flops: ModelFlops | None) -> Meter:
    index = pack_wrapped(np.array([6, 3, 4]), block_length=5)  # 5 | 1 3 1 | 3
    return Meter(index, flops, matmul_flops=1e6, device=torch.device("cpu"), memory_before=0)


def build_record(meter: Meter) -> StepRecord:
    clock = (10.0, 10.5, 12.0, 12.5)
    return meter.build_record(Progress(1, 2, 8), 2.5, 1e-4, 0.5, 8, np.array([2, 0]), clock)


def test_mfu_is_the_steps_flops_by_its_seconds_and_by_what_a_product_reaches():
    flops = ModelFlops(Flops(1000, 2000), attention_width=10, windows={None: 3})
    record = build_record(make_meter(flops))
    # A slice of 5, one of 3: 15 + 6 pairs in each of 3 layers; padding of 2 does not count.
    work = 8 * 3000 + 3 * (4 * 10 * 3 * (15 + 6))
    assert record.flops_per_second == work / 2.5
    assert record.mfu == work / 2.5 / 1e6
    assert record.padding_share == 0.2


def test_what_cannot_be_counted_is_none_and_nothing_else_changes():
    record = build_record(make_meter(None))
    assert (record.flops_per_second, record.mfu) == (None, None)
    assert (record.padding_share, record.tokens_per_second) == (0.2, 3.2)


def test_a_run_says_how_much_of_the_machine_each_step_used(make_config):
    config = make_config()
    train(config, [])
    records = read_records(config.run.output_dir / "run/logs/metrics.jsonl")
    for record in records:
        assert 0 < record["mfu"] < 1
        assert 0 <= record["padding_share"] < 1
        assert 0 < record["memory_bytes"] <= record["peak_memory_bytes"]


def test_the_last_lines_say_where_everything_is_and_what_to_type_next(make_config, capsys):
    config = make_config()
    train(config, [])
    run = config.run.output_dir / "run"
    end = capsys.readouterr().out.split("finished after step 6\n")[1]
    assert f"model    {run / 'checkpoints/checkpoint-6'}" in end
    assert f"qloop train --config {run / 'config.yaml'} --max_steps 12" in end


def test_tensorboard_is_written_by_key(make_config):
    config = make_config(tensorboard="true")
    train(config, [])
    folder = config.run.output_dir / "run/logs/tensorboard"
    assert any(file.name.startswith("events") for file in folder.iterdir())


def read_losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_records(run / "logs/metrics.jsonl")]


def test_an_unreachable_wandb_goes_offline_and_changes_no_loss(make_config):
    """In a process of its own, since wandb reads its environment once."""
    without, tracked = make_config(), make_config(experiment_name="tracked", wandb="true")
    train(without, [])
    file = tracked.run.output_dir / "tracked.yaml"
    file.write_text(dump_yaml(tracked))
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    nobody_listens = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    quickly = {"WANDB_INIT_TIMEOUT": "3"}
    result = subprocess.run(
        [sys.executable, "-m", "qloop", "train", "--config", str(file)],
        capture_output=True,
        text=True,
        env={**environment, **nobody_listens, **quickly},
    )
    assert result.returncode == 0, result.stderr
    assert "W&B cannot be reached" in result.stdout
    run = tracked.run.output_dir / "tracked"
    assert list((run / "logs/wandb").glob("offline-run-*"))
    assert read_losses(run) == read_losses(without.run.output_dir / "run")


def test_the_wandb_id_is_kept_for_all_parts_of_a_run(make_config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = make_config(wandb="true")
    train(config, [])
    file = config.run.output_dir / "run/logs/wandb_id.txt"
    before = file.read_text()
    train(make_config(wandb="true", max_steps=8), [])
    assert file.read_text() == before
    parts = list((config.run.output_dir / "run/logs/wandb").glob(f"offline-run-*-{before}"))
    assert parts


def test_a_missing_tensorboard_is_a_message_with_the_command_to_type(make_config, monkeypatch):
    import builtins

    real_import = builtins.__import__

    def no_tensorboard(name, *args, **kwargs):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_tensorboard)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train(make_config(tensorboard="true"), [])


class RefusingStream:
    """Takes so many bytes, then refuses, as a full disk does: a part of a line may get through."""

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


def test_a_status_that_the_disk_refuses_is_told_and_does_not_end_the_run(
    make_config, monkeypatch, capsys
):
    config = make_config()
    run = RunDirectory(config.run.output_dir / "run")
    run.create(config)
    reporter = Reporter(run, config, 0, 6, is_main=True)

    def refuse(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "status.json")

    monkeypatch.setattr(run, "write_status", refuse)
    reporter.write_status("running", 3)
    monkeypatch.setattr(reporter, "_write_results", refuse)
    with pytest.raises(
        CheckpointError, match="the model is saved; make room and type the same command again"
    ):
        reporter.write_results([])
    reporter.close()
    assert "status.json: not written: No space left on device" in capsys.readouterr().out
