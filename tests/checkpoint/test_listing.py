"""`qloop checkpoint`: tells good from bad, and touches nothing."""

import re
import sys

import pytest
from workspace import write_checkpoint

from qloop.checkpoint.store import CheckpointStore
from qloop.cli import main
from qloop.storage.filesystem import FileSystem


@pytest.fixture
def run(tmp_path):
    """A run with good checkpoints of steps 10 and 20, a damaged one of 30, one moved aside."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    store = CheckpointStore(tmp_path / "run/checkpoints", FileSystem())
    for step, loss in ((5, 9.0), (10, 1.25), (20, None), (30, 1.5)):
        content = memoryview(bytes(range(256)) * step)
        files = [("model.safetensors", [content])]
        write_checkpoint(store, step, files, {"loss": step / 8}, loss)
    store.set_aside(store.folder / "checkpoint-5")
    (store.folder / "damaged-checkpoint-5/COMMIT").unlink()
    weights = store.folder / "checkpoint-30/model.safetensors"
    weights.write_bytes(b"\x01" + weights.read_bytes()[1:])
    return tmp_path / "run"


def run_command(monkeypatch, *words) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["qloop", "checkpoint", *map(str, words)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_a_list_shows_size_losses_and_state(run, monkeypatch, capsys):
    assert run_command(monkeypatch, "list", run) == 0
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "checkpoint size held-out loss loss state",
        "checkpoint-10 2.56 kB 1.2500 1.2500 good, best",
        "checkpoint-20 5.12 kB - 2.5000 good",
        "checkpoint-30 damaged: model.safetensors is not as it was written: its SHA-256 differs",
        "damaged-checkpoint-5 damaged: COMMIT is missing",
    ]


def test_a_fast_list_reads_no_file_and_says_so(run, monkeypatch, capsys):
    run_command(monkeypatch, "list", run, "--fast")
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].endswith("1.5000  3.7500  whole by names and sizes")


def test_verify_ends_with_74_where_a_checkpoint_is_damaged(run, monkeypatch, capsys):
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert run_command(monkeypatch, "verify", run) == 74
    captured = capsys.readouterr()
    assert "checkpoint-20: good, 1 files" in captured.out
    assert "damaged: checkpoint-30; a run moves them aside" in captured.err
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_verify_takes_one_checkpoint_and_the_folder_of_all(run, monkeypatch):
    assert run_command(monkeypatch, "verify", run / "checkpoints/checkpoint-20") == 0
    assert run_command(monkeypatch, "verify", run / "checkpoints/checkpoint-30") == 74
    assert run_command(monkeypatch, "list", run / "checkpoints") == 0


def test_what_was_moved_aside_already_is_no_failure(run, monkeypatch):
    (run / "checkpoints/checkpoint-30").rename(run / "checkpoints/damaged-checkpoint-30")
    assert run_command(monkeypatch, "verify", run) == 0


def test_a_folder_without_checkpoints_is_an_error(tmp_path, monkeypatch, capsys):
    assert run_command(monkeypatch, "list", tmp_path) == 74
    assert "holds no checkpoint" in capsys.readouterr().err
    assert run_command(monkeypatch, "list", tmp_path / "nowhere") == 78
