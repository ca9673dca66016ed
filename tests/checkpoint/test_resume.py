"""What a run goes on from, and what it refuses to go on from."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qloop.checkpoint.resume import read_checkpoint, restore
from qloop.config.keys import Config
from qloop.errors import CheckpointError, ConfigError
from qloop.run import build_run
from qloop.train import train


@pytest.fixture
def config(make_config) -> Config:
    """Of a finished run with checkpoints of steps 3 and 6."""
    config = make_config()
    train(config, [])
    return config


def checkpoints_of(config: Config) -> Path:
    return config.run.output_dir / str(config.run.experiment_name) / "checkpoints"


def steps_of(config: Config) -> list[int]:
    file = checkpoints_of(config).parent / "logs/metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def damage(path: Path) -> None:
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-7] ^= 1
    weights.write_bytes(content)


def test_a_damaged_newest_is_moved_aside_and_the_one_before_is_used(config, capsys):
    folder = checkpoints_of(config)
    original = (folder / "checkpoint-6/model.safetensors").read_bytes()
    damage(folder / "checkpoint-6")
    capsys.readouterr()
    train(config, [])
    told = capsys.readouterr().out
    assert "checkpoint-6: damaged: model.safetensors is not as it was written" in told
    assert "going on from" in told
    assert (folder / "damaged-checkpoint-6").is_dir()
    assert (folder / "checkpoint-6/model.safetensors").read_bytes() == original, "step 3 goes on"
    assert steps_of(config) == [1, 2, 3, 4, 5, 6]


def test_a_run_with_nothing_but_damage_does_not_start_afresh_unless_told_to(config, make_config):
    folder = checkpoints_of(config)
    for step in (3, 6):
        damage(folder / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match="--resume restart") as error:
        train(config, [])
    assert str(error.value).count("damaged: model.safetensors is not as it was written") == 2
    with pytest.raises(CheckpointError, match="--resume restart"):  # only what was moved is left
        train(config, [])
    train(make_config(resume="restart"), [])
    assert steps_of(config) == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoint-3", "checkpoint-6", "damaged-checkpoint-3", "damaged-checkpoint-6"),
    }


def test_restart_never_overwrites_good_checkpoints(config, make_config):
    with pytest.raises(ConfigError, match="restart is for runs whose checkpoints are all damaged"):
        train(make_config(resume="restart"), [])


def test_a_named_checkpoint_that_is_damaged_is_an_error_and_stays_where_it_is(config, make_config):
    path = checkpoints_of(config) / "checkpoint-6"
    damage(path)
    branch = make_config(resume=path, experiment_name="branch")
    with pytest.raises(CheckpointError, match=r"not a good checkpoint: model\.safetensors is"):
        train(branch, [])
    assert path.is_dir()
    assert not checkpoints_of(branch).exists()


def test_a_named_checkpoint_that_is_missing_is_an_error(config, make_config):
    with pytest.raises(CheckpointError, match="not a good checkpoint: COMMIT is missing"):
        train(make_config(resume=checkpoints_of(config) / "checkpoint-5"), [])


def test_a_named_run_is_gone_on_with_from_its_newest_good_checkpoint(config, make_config, capsys):
    folder = checkpoints_of(config)
    damage(folder / "checkpoint-6")
    train(make_config(resume=folder.parent, experiment_name="branch"), [])
    said = capsys.readouterr().out
    assert "checkpoint-6: not a good checkpoint: model.safetensors is not as it was" in said
    assert f"going on from {folder / 'checkpoint-3'}" in said
    assert (folder / "checkpoint-6").is_dir()


def test_another_runs_checkpoint_under_a_fitting_name_is_refused(config, make_config):
    other = make_config(experiment_name="other", seed=7)
    train(other, [])
    folder = checkpoints_of(config)
    shutil.rmtree(folder / "checkpoint-6")
    shutil.copytree(checkpoints_of(other) / "checkpoint-6", folder / "checkpoint-6")
    with pytest.raises(ConfigError, match="seed: 7 -> 42"):
        train(config, [])


def test_what_a_run_is_made_of_may_change_where_it_is_allowed(config, make_config, corpus_dir):
    corpus = config.run.output_dir.parent / "corpus"
    shutil.copytree(corpus_dir, corpus)
    (corpus / "module_00.q").write_text("x:1+1 / another text altogether\n" * 9)
    changed = {"train_file": corpus, "max_steps": 8}
    with pytest.raises(ConfigError, match="--allow_change train_file"):
        train(make_config(**changed), [])
    with pytest.raises(ConfigError, match="--allow_change corpus"):
        train(make_config(**changed, allow_change="train_file"), [])
    train(make_config(**changed, allow_change="train_file,corpus"), [])
    assert steps_of(config) == list(range(1, 9))
    train(make_config(train_file=corpus, max_steps=9), [])  # now it is this run's


def test_another_optimizer_is_refused_and_where_it_is_allowed_its_moments_start_anew(
    config, make_config, capsys
):
    changed = {"optimizer": "muon", "max_steps": 8}
    with pytest.raises(ConfigError, match=r"optimizer: .?adamw.? -> .?muon") as error:
        train(make_config(**changed), [])
    assert "--allow_change optimizer" in str(error.value)
    train(make_config(**changed, allow_change="optimizer"), [])
    assert (
        "optimizer  adamw -> muon: its moments start anew, as at step 1" in capsys.readouterr().out
    )
    assert steps_of(config) == list(range(1, 9))
    moments = load_file(checkpoints_of(config) / "checkpoint-8/optimizer.safetensors")
    assert moments["model.norm.weight/step"] == 2
    train(make_config(optimizer="muon", max_steps=9), [])  # now it is this run's
    assert "start anew" not in capsys.readouterr().out


def test_moments_that_are_merely_paged_go_on(config, make_config):
    checkpoint = read_checkpoint(checkpoints_of(config) / "checkpoint-6")
    run = build_run(make_config(experiment_name="other"))
    checkpoint.provenance.config["optimizer"]["optimizer"] = "paged_adamw"
    assert restore(run.engine, checkpoint, "adamw") == ""
    run.close()
    saved = load_file(checkpoint.path / "optimizer.safetensors")
    moments = run.engine.collect_moments()
    assert moments.keys() == saved.keys()
    assert all(torch.equal(moment.gather(), saved[name]) for name, moment in moments.items())


def test_another_step_size_goes_on_with_the_next_block(make_config):
    """3 steps of 4 blocks, then 2 of 6: the blocks are those of 6 steps of 4."""
    keys = {"save_steps": 3, "eval_steps": 0, "learning_rate": "1e-2"}
    train(make_config(**keys, max_steps=3), [])
    larger = {**keys, "batch_size": 3, "max_steps": 5}
    with pytest.raises(ConfigError, match="batch_size: 2 -> 3"):
        train(make_config(**larger), [])
    with pytest.raises(
        ConfigError, match="cannot be divided into micro-batches of batch_size 3 on 1 processes"
    ):
        train(make_config(**larger, allow_change="batch_size"), [])
    config = make_config(**larger, allow_change="batch_size,step_blocks")
    train(config, [])
    whole = make_config(**keys, max_steps=6, experiment_name="whole")
    train(whole, [])
    assert read_totals(config)[-1] == read_totals(whole)[-1]


def read_totals(config: Config) -> list[tuple[int, int]]:
    file = checkpoints_of(config).parent / "logs/metrics.jsonl"
    records = map(json.loads, file.read_text().splitlines())
    return [(record["blocks_seen"], record["tokens_seen"]) for record in records]


def test_a_checkpoint_of_a_version_with_other_keys_is_refused_by_name(config):
    path = checkpoints_of(config) / "checkpoint-6"
    progress = json.loads((path / "progress.json").read_text())
    progress["config"]["run"]["colour"] = "blue"
    content = json.dumps(progress).encode()
    (path / "progress.json").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    sha256 = hashlib.sha256(content).hexdigest()
    manifest["files"]["progress.json"] = {"bytes": len(content), "sha256": sha256}
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match="none of this version of qloop"):
        train(config, [])


def test_an_end_that_has_passed_is_refused(config, make_config):
    with pytest.raises(ConfigError, match="has made 6 steps already and would end at 5"):
        train(make_config(max_steps=5), [])


def test_a_refused_start_leaves_no_folder_and_no_lock(make_config, tmp_path):
    config = make_config(train_file=tmp_path / "nowhere")
    for _ in range(2):
        with pytest.raises(Exception, match="nowhere"):
            train(config, [])
    assert not (config.run.output_dir / "run").exists()


@pytest.mark.parametrize("harm", ["missing", "renamed", "reshaped", "retyped", "garbage"])
def test_moments_that_do_not_fit_are_refused_by_name(config, make_config, harm):
    folder = checkpoints_of(config) / "checkpoint-6"
    run = build_run(make_config(experiment_name="other"))
    tensors = load_file(folder / "optimizer.safetensors")
    name = "model.norm.weight"
    if harm == "missing":
        tensors = {key: value for key, value in tensors.items() if key != f"{name}/exp_avg"}
    elif harm == "renamed":
        tensors["nobody/exp_avg"] = tensors.pop(f"{name}/exp_avg")
    elif harm == "reshaped":
        tensors[f"{name}/exp_avg"] = torch.zeros(3)
    elif harm == "retyped":
        tensors[f"{name}/exp_avg"] = tensors[f"{name}/exp_avg"].half()
    save_file(tensors, folder / "optimizer.safetensors")
    if harm == "garbage":
        (folder / "optimizer.safetensors").write_bytes(b"no tensors")
    before = [moment.gather().clone() for moment in run.engine.collect_moments().values()]
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        restore(run.engine, read_checkpoint(folder), "adamw")
    after = [moment.gather() for moment in run.engine.collect_moments().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "nothing was loaded"
    run.close()


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        read_checkpoint(tmp_path)
