"""Trackers: none can end or change a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qloop.config.loading import dump_yaml
from qloop.errors import ConfigError
from qloop.report.files import read_records
from qloop.train import train


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
