"""qloop as a library: `open_run`, the parts of a run, and single steps; also in a notebook."""

import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from workspace import Workspace, reset_accelerate

import qloop
from qloop.config.loading import dump_yaml
from qloop.errors import ConfigError
from qloop.report.files import read_records
from qloop.train import train

ROOT = Path(__file__).parents[1]


def test_steps_made_by_hand_are_those_of_the_command(make_config):
    config = make_config(max_steps=4)
    train(config)
    expected = [
        record["loss"] for record in read_records(config.run.output_dir / "run/logs/metrics.jsonl")
    ]
    reset_accelerate()
    with qloop.open_run(make_config(max_steps=4, experiment_name="by_hand")) as run:
        assert [qloop.make_step(run).loss for _ in range(4)] == expected


def test_a_run_gives_its_model_its_batches_and_its_counters(make_config):
    with qloop.open_run(make_config()) as run:
        before = next(run.model.parameters()).detach().clone()
        batches = run.batches.read(run.progress.blocks_seen)
        record = qloop.make_step(run)
        assert record.target_tokens == batches.target_tokens
        assert (run.progress.step, record.step) == (1, 1)
        assert not torch.equal(before, next(run.model.parameters()))


def test_the_folder_is_free_after_the_block_even_after_an_error(make_config):
    config = make_config()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), qloop.open_run(config):
            raise ZeroDivisionError


def test_a_saved_step_is_gone_on_from(make_config):
    config = make_config()
    with qloop.open_run(config) as run:
        loss = qloop.make_step(run).loss
        run.checkpoints.save(run.engine, run.progress, loss, None, must_succeed=False)
    with qloop.open_run(config) as run:
        assert run.progress.step == 1


def test_keys_replace_those_of_the_file_and_are_checked(make_config, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(make_config()))
    keys = {"experiment_name": "keys", "wandb": False, "allow_change": ("seed", "corpus")}
    with qloop.open_run(str(file), max_steps=3, **keys) as run:
        assert run.last_step == 3
        assert run.config.run.allow_change == ("seed", "corpus")
        assert run.folder.directory.path.name == "keys"
    with (
        pytest.raises(ConfigError, match="did you mean --max_steps"),
        qloop.open_run(file, max_step=3),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="max_steps: give keys"),
        qloop.open_run(make_config(), max_steps=3),
    ):
        pass


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="opn_run"):
        qloop.opn_run  # noqa: B018


@pytest.mark.commands
def test_it_works_in_a_notebook(tmp_path, corpus_dir, tokenizer_dir):
    """The kernel runs in another folder than the config: relative paths start at the file."""
    workspace = Workspace(tmp_path / "work", corpus_dir, tokenizer_dir)
    config = workspace.make_config()
    folder = tmp_path / "work/configs"
    folder.mkdir()
    shutil.copytree(corpus_dir, folder / "q")
    text = dump_yaml(config).replace(f"train_file: {corpus_dir}", "train_file: q")
    assert "train_file: q" in text
    (folder / "tiny.yaml").write_text(text)
    cells = [
        "import qloop",
        f"opened = qloop.open_run({str(folder / 'tiny.yaml')!r}, experiment_name='notebook')\n"
        "run = opened.__enter__()",
        "records = [qloop.make_step(run) for _ in range(2)]\n"
        "print([record.step for record in records], type(run.model).__name__)",
        "opened.__exit__(None, None, None)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    (tmp_path / "elsewhere").mkdir()
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path / "elsewhere")}},
    )
    client.execute()
    assert "[1, 2] Qwen2ForCausalLM" in notebook.cells[2].outputs[0]["text"]
