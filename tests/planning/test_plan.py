"""The plan: what fits, what would, and what the run does with it."""

import json
import subprocess
import sys

import pytest
import torch
from workspace import Workspace, reset_accelerate

import qloop.planning.simulation
from qloop.distributed.engine import Engine
from qloop.errors import ConfigError, MemoryFullError, PlanError
from qloop.hardware import Device
from qloop.planning.advice import suggest_changes
from qloop.planning.plan import CONTEXT_BYTES, Placement, find_placement, make_plan
from qloop.planning.table import count_disk_bytes, estimate_seconds, find_largest_batch, show_plans
from qloop.train import train


@pytest.fixture
def workspace(tmp_path, corpus_dir, tokenizer_dir) -> Workspace:
    return Workspace(tmp_path, corpus_dir, tokenizer_dir)


def make_config(workspace, **keys):
    keys = {"gradient_checkpointing": "auto", "max_seq_length": 256, **keys}
    return workspace.make_config(**keys)


def gpu(beside_context: float, **keys) -> Placement:
    """A GPU with so many bytes for tensors."""
    memory = int(beside_context) + CONTEXT_BYTES["cuda"]
    return Placement(Device("NVIDIA H100", "cuda", memory), "bf16", **keys)


LARGE = 1e12


def test_the_peak_is_the_sum_of_its_parts_and_the_optimizer_has_eight_bytes(workspace):
    plan = make_plan(make_config(workspace), gpu(LARGE))
    assert plan.peak_bytes == sum(plan.parts.values())
    assert plan.parts["optimizer"] == pytest.approx(2 * plan.parts["gradients"], rel=0.01)
    assert plan.fits


def test_auto_computes_again_only_as_much_as_it_must(workspace):
    config = make_config(workspace)
    peaks = {}
    for mode in ("off", "selective", "full"):
        wanted = make_config(workspace, gradient_checkpointing=mode)
        peaks[mode] = make_plan(wanted, gpu(LARGE)).peak_bytes
    assert peaks["off"] > peaks["selective"] > peaks["full"]
    for mode, peak in peaks.items():
        room = Placement(Device("NVIDIA H100", "cuda", int((peak + 1e9) / 0.9) + 9), "bf16")
        assert make_plan(config, room).recomputation == mode
    assert make_plan(config, gpu(0)).recomputation == "full"


def test_a_long_run_on_a_gpu_is_planned_compiled_and_keeps_less(workspace):
    config = make_config(workspace, gradient_checkpointing="off", max_steps=500)
    compiled = make_plan(config, gpu(LARGE))
    plain = make_plan(config, gpu(LARGE, micro_batches=10))  # a run of no more
    assert (compiled.kernels.compiles, plain.kernels.compiles) == (True, False)
    assert compiled.parts["activations"] < 0.95 * plain.parts["activations"]
    forbidden = make_config(workspace, gradient_checkpointing="off", compile="false", max_steps=500)
    assert not make_plan(forbidden, gpu(LARGE)).kernels.compiles
    assert not make_plan(config, gpu(LARGE, engine="zero2", num_processes=2)).kernels.compiles


def test_layers_that_no_compiler_takes_are_planned_as_they_are(workspace, monkeypatch):
    def fail(*_):
        raise RuntimeError("data-dependent control flow")

    config = make_config(workspace, gradient_checkpointing="off", max_steps=500)
    plain = make_plan(config, gpu(LARGE, micro_batches=10))
    monkeypatch.setattr(qloop.planning.simulation, "_like_compiled", fail)
    assert make_plan(config, gpu(LARGE)).parts == plain.parts


def test_the_largest_batch_fits_and_one_block_more_does_not(workspace):
    config = make_config(workspace, gradient_checkpointing="off")
    placement = gpu(make_plan(config, gpu(LARGE)).peak_bytes * 3)
    largest = find_largest_batch(make_plan(config, placement))
    assert largest > 2
    fits = [
        make_plan(
            make_config(workspace, gradient_checkpointing="off", batch_size=size), placement
        ).fits
        for size in (largest, largest + 1)
    ]
    assert fits == [True, False]
    assert find_largest_batch(make_plan(config, gpu(0))) == 0


def test_suggestions_fit_and_the_cheapest_comes_first(workspace):
    config = make_config(workspace, gradient_checkpointing="off", batch_size=4)
    needed = make_plan(config, gpu(LARGE)).peak_bytes
    changes = suggest_changes(make_plan(config, gpu(needed - 1)))
    assert [change for change, _ in changes] == [
        {"batch_size": 1, "gradient_accumulation_steps": 8},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": "full"},
    ]
    assert all(plan.fits for _, plan in changes)
    # What no single change can do, several may.
    smallest = min(plan.peak_bytes for _, plan in changes)
    together = suggest_changes(make_plan(config, gpu(smallest - 1)))
    assert together
    assert together[0][0]["batch_size"] == 1
    assert len(together[0][0]) > 2
    assert suggest_changes(make_plan(config, gpu(0))) == []


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_many_gpus_share_what_their_engine_shares(workspace, engine):
    config = make_config(workspace, gradient_checkpointing="full")
    one = make_plan(config, gpu(LARGE)).parts
    many = make_plan(config, gpu(LARGE, engine=engine, num_processes=8)).parts
    shared = {"ddp": (), "zero2": ("gradients",), "zero3": ("parameters", "gradients")}
    for part in shared.get(engine, ("parameters", "gradients", "optimizer")):
        assert many[part] < one[part] / 3
    if engine == "ddp":
        assert many["optimizer"] == one["optimizer"]
        assert many["gradients"] > one["gradients"]


def test_a_checkpoint_is_as_large_as_planned(workspace):
    config = make_config(workspace, max_steps=2, warmup_steps=0, save_steps=2)
    planned = make_plan(config, gpu(LARGE))
    train(config, [])
    folder = workspace.folder / "output/run/checkpoints/checkpoint-2"
    tensors = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert planned.checkpoint_bytes == pytest.approx(tensors, rel=0.05)
    assert count_disk_bytes(planned) == planned.checkpoint_bytes  # one save in all


def test_disk_is_for_what_is_kept_and_one_more(workspace):
    config = make_config(workspace, max_steps=100, save_steps=10, keep_checkpoints=3)
    plan = make_plan(config, gpu(LARGE))
    assert count_disk_bytes(plan) == (3 + 1 + 1) * plan.checkpoint_bytes  # and the best


def test_time_follows_flops_and_what_is_computed_again(workspace):
    off, full = (
        make_plan(make_config(workspace, gradient_checkpointing=mode), gpu(LARGE))
        for mode in ("off", "full")
    )
    assert estimate_seconds(off, 1e12) == off.step_flops / 1e12
    assert 1.2 < estimate_seconds(full, 1e12) / estimate_seconds(off, 1e12) < 4 / 3
    assert estimate_seconds(off, None) is None


# What a person types


def test_the_table_shows_all_methods_and_what_would_fit(workspace):
    config = make_config(workspace, gradient_checkpointing="off", batch_size=4)
    needed = make_plan(config, gpu(LARGE)).peak_bytes
    text = show_plans(config, gpu(needed * 0.9), flops_use=0.4)
    assert "full *" in text
    assert "lora" in text
    assert "qlora" in text
    assert "it would fit with one of:\n  --batch_size 1" in text


def test_devices_are_known_by_name_and_memory_can_be_given(workspace):
    config = make_config(workspace)
    placement = find_placement(config, "h200", None, 1, "ddp")
    assert placement == Placement(Device("NVIDIA H200", "cuda", 141_000_000_000), "bf16", "ddp", 1)
    assert find_placement(config, "h200", 20.0, 1, "ddp").device.memory_bytes == 20_000_000_000
    assert find_placement(config, None, None, 1, "ddp").precision == "fp32"
    with pytest.raises(ConfigError, match="--device: unknown h201; choose h200"):
        find_placement(config, "h201", None, 1, "ddp")


def test_the_command_reads_no_weight_and_no_corpus(workspace):
    flags = workspace.flags(train_file="nowhere.jsonl", tokenizer_name="no-tokenizer")
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "qloop", "plan", *words, "--device", "rtx4090"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "NVIDIA GeForce RTX 4090, 24 GB" in done.stdout
    assert "largest batch_size" in done.stdout
    wrong = subprocess.run([*command, "--bacth_size", "2"], capture_output=True, text=True)
    assert wrong.returncode == 78
    assert "batch_size" in wrong.stderr


# What the run does with it


def test_a_run_says_what_was_planned_and_what_it_took(workspace):
    train(make_config(workspace, max_steps=2, warmup_steps=0), [])
    log = (workspace.folder / "output/run/logs/training_log.txt").read_text()
    assert "planned at the peak, of" in log
    assert "gradient checkpointing off" in log
    assert "planned for a step" in log


@pytest.mark.parametrize(
    "lack",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_ends_in_what_was_needed_and_what_would_fit(workspace, monkeypatch, lack):
    backward, calls = Engine.backward, []

    def fill(self, loss_sum, divisor):
        calls.append(1)
        if len(calls) == 5:  # the first micro-batch of two in step 3
            raise lack
        backward(self, loss_sum, divisor)

    monkeypatch.setattr(Engine, "backward", fill)
    with pytest.raises(MemoryFullError) as caught:
        train(make_config(workspace, batch_size=2), [])
    message = str(caught.value)
    assert message.startswith("step 3: out of memory: ")
    assert "planned at the peak (parameters" in message
    assert "one of these needs less:\n  --batch_size 1 --gradient_acc" in message
    assert message.endswith("--allow_change batch_size,gradient_accumulation_steps")
    assert message.count("\n") == 4
    status = (workspace.folder / "output/run/status.json").read_text()
    assert '"failed"' in status


def test_a_run_may_go_on_with_what_was_suggested(workspace):
    """More recomputation and another division of the step make no other run."""
    keys = {"max_steps": 4, "warmup_steps": 0, "save_steps": 2}
    train(make_config(workspace, **keys, gradient_checkpointing="off"), [])
    reset_accelerate()
    more = {
        **{"max_steps": 6, "gradient_checkpointing": "full"},
        **{"batch_size": 1, "gradient_accumulation_steps": 4},
        "allow_change": "batch_size,gradient_accumulation_steps",
    }
    train(make_config(workspace, **{**keys, **more}), [])
    status = json.loads((workspace.folder / "output/run/status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 6)


def test_a_model_that_cannot_be_simulated_trains_all_the_same(workspace, monkeypatch):
    def fail(*values, **keys):
        raise RuntimeError("a value was asked for\nand more")

    monkeypatch.setattr("qloop.planning.plan.simulate_step", fail)
    train(make_config(workspace, max_steps=2, warmup_steps=0), [])
    log = (workspace.folder / "output/run/logs/training_log.txt").read_text()
    assert "memory     not planned: Qwen2ForCausalLM does not run on tensors without" in log
    assert "values: a value was asked for\n" in log
    assert "gradient checkpointing full" in log
    with pytest.raises(PlanError, match="not planned: Qwen2ForCausalLM"):
        make_plan(
            make_config(workspace), find_placement(make_config(workspace), "h100", None, 1, "")
        )
