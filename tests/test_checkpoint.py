"""Checkpoints: whole or absent, and loadable by the libraries that people know."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qloop.assembly import assemble
from qloop.checkpoint import filesystem
from qloop.checkpoint.manager import CheckpointManager, read_checkpoint
from qloop.errors import CheckpointError
from qloop.train import save, train


@pytest.fixture
def parts(make_config):
    parts = assemble(make_config(), [])
    parts.optimizer.step()
    for parameter in parts.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parts.optimizer.step()
    yield parts
    parts.report.close()


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_full_checkpoint_is_a_model_that_transformers_loads(make_config):
    config = make_config()
    train(config, [])
    folder = config.run.output_dir / "run/checkpoints/checkpoint-6"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|endoftext|>"
    logits = model(torch.tensor([tokenizer("select from t")["input_ids"]])).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_checkpoint_loads_by_peft_and_holds_no_base(make_config, method):
    import peft

    train(make_config(experiment_name="base", max_steps=3), [])
    base = make_config().run.output_dir / "base/checkpoints/checkpoint-3"
    config = make_config(
        model_config_file=None,
        tokenizer_name=None,
        model_name=base,
        training_method=method,
        max_steps=3,
    )
    train(config, [])
    folder = config.run.output_dir / "run/checkpoints/checkpoint-3"
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(10)[None]
    before = plain(ids).logits
    adapted = peft.PeftModel.from_pretrained(plain, folder)
    assert not torch.allclose(before, adapted(ids).logits, atol=1e-4)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert all("lora_" in name for name in names)
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)


def test_nothing_in_a_checkpoint_is_a_pickle(make_config):
    config = make_config()
    train(config, [])
    folder = config.run.output_dir / "run/checkpoints/checkpoint-6"
    endings = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert endings <= {".safetensors", ".json", ".md", ".jinja", ".txt"}


def test_progress_is_readable(parts):
    parts.progress.advance(blocks=4, target_tokens=99)
    save(parts)
    checkpoint = read_checkpoint(parts.run.checkpoints / "checkpoint-1")
    assert (checkpoint.progress.step, checkpoint.progress.blocks_seen) == (1, 4)
    assert checkpoint.progress.tokens_seen == 99
    assert checkpoint.config["schedule"]["learning_rate"] == 0.01
    assert set(checkpoint.fingerprints) == {"corpus", "tokenizer", "frozen_weights"}


def test_rotation_keeps_the_newest_by_number_and_comes_after_the_save(parts):
    for step in (8, 9, 10, 11):
        parts.progress.step = step
        save(parts)
    names = checkpoint_names(parts.run.checkpoints)
    assert names == ["checkpoint-10", "checkpoint-11", "checkpoint-9"]
    assert parts.checkpoints.newest().name == "checkpoint-11"


def test_a_save_that_fails_leaves_every_older_checkpoint_and_no_part(parts):
    parts.progress.step = 1
    save(parts)
    parts.progress.step = 2
    # A file where the folder's name should go: the last operation of the save is what fails.
    (parts.run.checkpoints / "checkpoint-2").mkdir()
    (parts.run.checkpoints / "checkpoint-2/occupied").write_text("")
    with pytest.raises(CheckpointError, match="older checkpoints are untouched"):
        save(parts)
    assert checkpoint_names(parts.run.checkpoints) == ["checkpoint-1", "checkpoint-2"]
    assert read_checkpoint(parts.run.checkpoints / "checkpoint-1").progress.step == 1


def test_an_unfinished_save_is_never_taken_for_a_checkpoint(parts):
    parts.progress.step = 1
    save(parts)
    shutil.copytree(
        parts.run.checkpoints / "checkpoint-1", parts.run.checkpoints / ".checkpoint-2-abc"
    )
    (parts.run.checkpoints / "checkpoint-x").mkdir()
    assert [path.name for path in parts.checkpoints.list()] == ["checkpoint-1"]
    parts.progress.step = 3
    save(parts)
    assert not (parts.run.checkpoints / ".checkpoint-2-abc").exists()


def test_no_checkpoint_is_newest_of_an_empty_or_missing_folder(parts, tmp_path):
    manager = CheckpointManager(tmp_path / "missing", 3, parts.accelerator)
    assert manager.newest() is None


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("harm", ["missing", "renamed", "reshaped", "garbage"])
def test_moments_that_do_not_fit_are_refused_by_name(parts, harm):
    parts.progress.step = 1
    save(parts)
    folder = parts.run.checkpoints / "checkpoint-1"
    tensors = load_file(folder / "optimizer.safetensors")
    name = "model.norm.weight"
    if harm == "missing":
        tensors = {key: value for key, value in tensors.items() if not key.startswith(name)}
    elif harm == "renamed":
        tensors["nobody/exp_avg"] = tensors.pop(f"{name}/exp_avg")
    elif harm == "reshaped":
        tensors[f"{name}/exp_avg"] = torch.zeros(3)
    save_file(tensors, folder / "optimizer.safetensors")
    if harm == "garbage":
        (folder / "optimizer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        parts.checkpoints.restore_optimizer(read_checkpoint(folder), parts.model, parts.optimizer)


def test_a_removed_folder_is_gone_with_its_name_first(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "file").write_text("x")
    filesystem.remove(folder)
    assert list(tmp_path.iterdir()) == []
