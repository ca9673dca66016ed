"""All reports of a run together."""

import errno
import json

import pytest

from qloop.errors import CheckpointError
from qloop.report.metrics import StepRecord
from qloop.report.reporter import Reporter
from qloop.run_directory import RunDirectory
from qloop.train import train


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


def test_the_last_lines_say_where_everything_is_and_what_to_type_next(make_config, capsys):
    config = make_config()
    train(config, [])
    run = config.run.output_dir / "run"
    end = capsys.readouterr().out.split("finished after step 6\n")[1]
    assert f"model    {run / 'checkpoints/checkpoint-6'}" in end
    assert f"qloop train --config {run / 'config.yaml'} --max_steps 12" in end


@pytest.fixture
def run(make_config) -> tuple[RunDirectory, Reporter]:
    config = make_config()
    directory = RunDirectory(config.run.output_dir / "run")
    directory.create(config)
    reporter = Reporter(directory, config, 0, 6, is_main=True)
    yield directory, reporter
    reporter.close()


def test_a_status_that_the_disk_refuses_is_told_and_does_not_end_the_run(run, monkeypatch, capsys):
    def refuse(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "status.json")

    directory, reporter = run
    monkeypatch.setattr(directory, "write_status", refuse)
    reporter.write_status("running", 3)
    assert "status.json: not written: No space left on device" in capsys.readouterr().out


def test_results_that_the_disk_refuses_end_in_a_message_that_the_model_is_saved(run):
    directory, reporter = run
    directory.results.rmdir()
    with pytest.raises(
        CheckpointError, match="the model is saved; make room and type the same command again"
    ):
        reporter.write_results([])
