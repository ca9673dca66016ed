"""The loop: its arithmetic, its refusals, and that a restart changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workspace import write_model_config

from qloop.config.keys import Config
from qloop.config.loading import dump_yaml, load_config
from qloop.distributed.stops import StopRequest
from qloop.errors import ConfigError, DivergenceError, StoppedError
from qloop.run import build_run
from qloop.train import run_steps, train

COMPARED = ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "tokens_seen")


def read_steps(config: Config) -> list[tuple]:
    file = config.run.output_dir / str(config.run.experiment_name) / "logs" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [tuple(record[name] for name in COMPARED) for record in records]


def read_tensors(config: Config, step: int) -> dict[str, torch.Tensor]:
    folder = (
        config.run.output_dir / str(config.run.experiment_name) / f"checkpoints/checkpoint-{step}"
    )
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_run(one: Config, other: Config, last_step: int) -> None:
    assert read_steps(one) == read_steps(other)
    tensors, others = read_tensors(one, last_step), read_tensors(other, last_step)
    assert tensors.keys() == others.keys()
    assert any("exp_avg" in name for name in tensors), "moments are compared too"
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def keep_run_until(config: Config, step: int, other_name: str) -> None:
    """Copies a run as it was when it had saved a step: what a kill would have left."""
    source = config.run.output_dir / str(config.run.experiment_name)
    target = config.run.output_dir / other_name
    shutil.copytree(source, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


@pytest.fixture
def base_model(make_config) -> Path:
    """A trained tiny model to adapt."""
    config = make_config(experiment_name="base", max_steps=4, save_steps=4)
    train(config, [])
    return config.run.output_dir / "base/checkpoints/checkpoint-4"


def test_loss_falls_on_training_and_held_out_documents(make_config):
    config = make_config(max_steps=40, eval_steps=0)
    train(config, [])
    losses = [loss for _, loss, *_ in read_steps(config)]
    results = json.loads((config.run.output_dir / "run/results/evaluation.json").read_text())
    assert losses[-1] < 0.5 * losses[0]
    assert results["final"]["bits_per_byte"] < 0.5 * results["first"]["bits_per_byte"]


def test_two_runs_of_one_seed_are_equal_to_the_last_bit(make_config):
    one, other = make_config(experiment_name="one"), make_config(experiment_name="other")
    train(one, [])
    train(other, [])
    assert_same_run(one, other, 6)


def test_another_seed_gives_another_run(make_config):
    one, other = make_config(experiment_name="one"), make_config(experiment_name="other", seed=1)
    train(one, [])
    train(other, [])
    assert read_steps(one) != read_steps(other)


@pytest.mark.parametrize("packing", ["best_fit", "wrapped"])
def test_accumulation_changes_nothing_but_rounding(make_config, packing):
    """8 x 1 and 2 x 4 micro-batches, with prompts so that targets are uneven between them."""
    corpus = make_config().run.output_dir.parent / "prompts.jsonl"
    rows = [
        {"prompt": f"/ case {n}\n" * (n % 7 + 1), "completion": f"f{n}:{{x+{n}}} " * (40 - n)}
        for n in range(40)
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        config = make_config(
            experiment_name=f"b{batch_size}",
            train_file=corpus,
            packing=packing,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=5,
        )
        train(config, [])
        runs.append(read_steps(config))
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            assert mine[1] == pytest.approx(theirs[1], abs=1e-6)
            assert mine[2] == pytest.approx(theirs[2], rel=1e-4)
            assert mine[3:] == theirs[3:]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_killed_full_run_resumes_to_the_last_bit_in_mid_epoch(make_config, accumulation):
    keys = {"gradient_accumulation_steps": accumulation, "max_steps": 8, "save_steps": 3}
    whole = make_config(experiment_name="whole", **keys)
    train(whole, [])
    keep_run_until(whole, 3, "killed")
    killed = make_config(experiment_name="killed", **keys)
    train(killed, [])
    assert_same_run(whole, killed, 8)


@pytest.mark.parametrize(
    ("optimizer", "moment"), [("adamw_8bit", "absmax2"), ("muon", "momentum_buffer")]
)
def test_a_killed_run_resumes_to_the_last_bit_with_another_optimizer(
    make_config, optimizer, moment
):
    wide = make_config().run.output_dir.parent / "wide"
    keys = {
        "model_config_file": write_model_config(wide, hidden_size=64, intermediate_size=96),
        "optimizer": optimizer,
    }
    whole = make_config(experiment_name="whole", **keys)
    train(whole, [])
    keep_run_until(whole, 3, "killed")
    killed = make_config(experiment_name="killed", **keys)
    train(killed, [])
    assert_same_run(whole, killed, 6)
    moments = [name for name in read_tensors(whole, 6) if name.endswith(f"/{moment}")]
    assert len([name for name in moments if "model.layers" in name]) >= 6


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_killed_adapter_run_resumes_to_the_last_bit_with_dropout(make_config, base_model, method):
    keys = {
        "model_config_file": None,
        "tokenizer_name": None,
        "model_name": base_model,
        "training_method": method,
        "lora_dropout": 0.2,
        "gradient_checkpointing": "true",
        "max_steps": 7,
        "save_steps": 3,
    }
    whole = make_config(experiment_name="whole", **keys)
    train(whole, [])
    keep_run_until(whole, 3, "killed")
    killed = make_config(experiment_name="killed", **keys)
    train(killed, [])
    assert_same_run(whole, killed, 7)


def test_resuming_twice_in_one_epoch_and_past_its_end_changes_nothing(make_config):
    # 47 blocks in steps of 4: the epoch ends within step 12.
    keys = {"max_steps": 15, "save_steps": 4, "keep_checkpoints": 9, "eval_steps": 0}
    whole = make_config(experiment_name="whole", **keys)
    train(whole, [])
    killed = whole
    for step in (4, 8, 12):
        keep_run_until(killed, step, f"killed{step}")
        killed = make_config(experiment_name=f"killed{step}", **keys)
        train(killed, [])
        assert_same_run(whole, killed, 15)


def test_a_process_that_is_killed_goes_on_to_the_last_bit(make_config):
    keys = {"max_steps": 60, "save_steps": 5, "eval_steps": 0, "warmup_steps": 2}
    whole = make_config(experiment_name="whole", **keys)
    train(whole, [])
    killed = make_config(experiment_name="killed", **keys)
    file = killed.run.output_dir / "killed.yaml"
    file.write_text(dump_yaml(killed))
    command = [sys.executable, "-m", "qloop", "train", "--config", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    saved = killed.run.output_dir / "killed/checkpoints/checkpoint-10"
    while process.poll() is None and not saved.exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was killed before its end"
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "of 60 made; going on from" in output
    assert_same_run(whole, killed, 60)


def test_every_block_is_read_once_an_epoch(make_config):
    config = make_config(max_steps=None, num_epochs=2, batch_size=1, gradient_accumulation_steps=1)
    run = build_run(config)
    assert run.last_step == 2 * len(run.data.index)
    run.close()


def test_the_earlier_of_max_steps_and_num_epochs_ends_the_run(make_config):
    for max_steps, expected in ((3, 3), (1000, 12)):  # 47 blocks, 4 a step
        config = make_config(
            experiment_name=f"run{max_steps}", max_steps=max_steps, num_epochs=1.0, warmup_steps=1
        )
        run = build_run(config)
        assert run.last_step == expected
        run.close()


def test_a_step_that_is_not_finite_leaves_weights_and_moments_as_they_were(make_config):
    run = build_run(make_config(max_steps=6))
    before: dict[str, torch.Tensor] = {}

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if run.progress.step < 2:
            return gradient
        for name, parameter in run.model.named_parameters():
            before.setdefault(name, parameter.detach().clone())
            for moment, tensor in run.engine.optimizer.state[parameter].items():
                before.setdefault(f"{name}/{moment}", tensor.clone())
        return torch.full_like(gradient, float("nan"))

    next(run.model.parameters()).register_hook(poison)
    with pytest.raises(DivergenceError, match=r"step 3: .*weights are those after step 2"):
        run_steps(run, StopRequest())
    run.close()
    assert run.progress.step == 2
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name])
        for moment, tensor in run.engine.optimizer.state[parameter].items():
            assert torch.equal(tensor, before[f"{name}/{moment}"])


def test_a_save_that_is_under_way_ends_before_an_error_ends_the_run(make_config, monkeypatch):
    from qloop.storage.filesystem import FileSystem

    config = make_config(save_steps=3, eval_steps=0)
    sync, release = FileSystem.sync, threading.Event()

    def wait_and_sync(self: FileSystem, descriptor: int) -> None:
        release.wait(timeout=30)
        sync(self, descriptor)

    monkeypatch.setattr(FileSystem, "sync", wait_and_sync)
    run = build_run(config)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if run.progress.step < 4:
            return gradient
        threading.Timer(0.2, release.set).start()
        return torch.full_like(gradient, float("nan"))

    next(run.model.parameters()).register_hook(poison)
    monkeypatch.setattr("qloop.train.build_run", lambda config, notes: run)
    with pytest.raises(DivergenceError):
        train(config, [])
    assert (config.run.output_dir / "run/checkpoints/checkpoint-3/COMMIT").exists()


def test_divergence_is_told_in_status_and_by_its_exit_code(make_config):
    config = make_config(learning_rate=1e30, max_grad_norm=1e9, warmup_steps=0, max_steps=20)
    with pytest.raises(DivergenceError) as error:
        train(config, [])
    status = json.loads((config.run.output_dir / "run/status.json").read_text())
    assert error.value.exit_code == 76
    assert status["state"] == "diverged"
    assert "lower learning_rate" in status["reason"]


def test_a_signal_stops_at_a_step_boundary_and_the_same_command_goes_on(make_config):
    keys = {"max_steps": 400, "save_steps": 400, "eval_steps": 0, "warmup_steps": 2}
    config = make_config(experiment_name="stopped", **keys)
    metrics = config.run.output_dir / "stopped/logs/metrics.jsonl"

    def interrupt_later() -> None:
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt_later)
    thread.start()
    with pytest.raises(StoppedError, match="SIGTERM: stopped and saved after step"):
        train(config, [])
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == handler, "the handler is put back"
    status = json.loads((config.run.output_dir / "stopped/status.json").read_text())
    step = status["step"]
    assert status["state"] == "stopped"
    assert 3 <= step < 400
    assert (config.run.output_dir / f"stopped/checkpoints/checkpoint-{step}").is_dir()
    longer = make_config(experiment_name="stopped", **{**keys, "max_steps": step + 2})
    train(longer, [])
    assert [record[0] for record in read_steps(longer)] == list(range(1, step + 3))


def test_a_finished_run_started_again_does_nothing_and_says_so(make_config, capsys):
    config = make_config()
    train(config, [])
    before = read_steps(config)
    capsys.readouterr()
    train(config, [])
    assert "6 of 6 made" in capsys.readouterr().out
    assert read_steps(config) == before


def test_a_finished_run_can_be_made_longer(make_config):
    train(make_config(max_steps=6), [])
    longer = make_config(max_steps=9)
    train(longer, [])
    assert [record[0] for record in read_steps(longer)] == list(range(1, 10))


def test_a_run_directory_of_another_run_is_refused_and_left_as_it_is(make_config):
    config = make_config()
    train(config, [])
    before = (config.run.output_dir / "run/config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.01 -> 0\.02"):
        train(make_config(learning_rate=0.02), [])
    assert (config.run.output_dir / "run/config.yaml").read_text() == before


def test_a_changed_corpus_is_not_gone_on_with(make_config, corpus_dir, tmp_path):
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_dir, corpus)
    train(make_config(train_file=corpus), [])
    (corpus / "module_00.q").write_text("x:1+1 / another text altogether\n" * 9)
    with pytest.raises(ConfigError, match=r"corpus: [0-9a-f]{12} -> [0-9a-f]{12}"):
        train(make_config(train_file=corpus, max_steps=9), [])


def test_a_named_checkpoint_starts_a_branch_and_never_overwrites_steps(make_config):
    config = make_config()
    train(config, [])
    older = config.run.output_dir / "run/checkpoints/checkpoint-3"
    with pytest.raises(ConfigError, match="whose steps would be written anew"):
        train(make_config(resume=older), [])
    branch = make_config(resume=older, experiment_name="branch")
    train(branch, [])
    tensors = read_tensors(config, 6)
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(branch, 6).items()
    )


def test_the_written_config_starts_the_same_run_again(make_config):
    config = make_config()
    train(config, [])
    written = load_config(config.run.output_dir / "run/config.yaml", {}).config
    assert dump_yaml(written) == dump_yaml(config)


@pytest.mark.parametrize("key", [{"deterministic": "true"}, {"attention": "eager"}])
def test_kernels_of_another_choice_change_nothing_but_rounding(make_config, key):
    one, other = make_config(), make_config(experiment_name="other", **key)
    train(one, [])
    train(other, [])
    for mine, theirs in zip(read_steps(one), read_steps(other), strict=True):
        assert mine[1] == pytest.approx(theirs[1], abs=1e-4)
