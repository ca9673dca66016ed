"""A run and its plan choose the same kernels, on every kind of device."""

import pytest
import torch
from workspace import Workspace, reset_accelerate

from qloop.config.keys import LoraConfig
from qloop.errors import ConfigError
from qloop.hardware import Device
from qloop.model import activations
from qloop.model.build import build_model
from qloop.planning.plan import Placement, choose_kernels, make_plan
from qloop.run import build_run

CPU = torch.device("cpu")
DEVICES = {
    "cpu": Placement(Device("CPU", "cpu", 10**11), "fp32", micro_batches=500),
    "cuda": Placement(Device("NVIDIA H100", "cuda", 10**11), "bf16", micro_batches=500),
    "cuda without bf16": Placement(Device("Tesla V100", "cuda", 10**11), "fp32", micro_batches=500),
    "cuda, FSDP2": Placement(Device("NVIDIA H100", "cuda", 10**11), "bf16", "fsdp2", 2, 500),
    "cuda, ZeRO-3": Placement(Device("NVIDIA H100", "cuda", 10**11), "bf16", "zero3", 2, 500),
}
SETTINGS = [
    {},
    {"attention": "eager", "loss": "logits", "compile": "false"},
    {"loss": "fused"},
    {"compile": "false"},
    {"gradient_checkpointing": "selective"},
    {"gradient_checkpointing": "auto"},
    {"max_seq_length": 256, "batch_size": 8},
]


@pytest.mark.parametrize("placement", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(
    ("model_type", "keys"), [*(("qwen2", keys) for keys in SETTINGS), ("gpt2", {}), ("gemma2", {})]
)
def test_a_plan_and_a_run_choose_the_same(make_config, tmp_path, placement, keys, model_type):
    """The run's model has values and is the one that trains; the plan's has shapes alone."""
    from workspace import write_model_config

    keys = {"gradient_checkpointing": "off", "max_steps": 100, **keys}
    file = write_model_config(tmp_path / model_type, model_type)
    config = make_config(model_config_file=file, **keys)
    model = build_model(config.model, LoraConfig(), placement.precision, CPU, seed=0)
    assert make_plan(config, placement).kernels == choose_kernels(model, config, placement)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_run_that_is_built_is_the_one_that_was_planned(tmp_path, method):
    workspace = Workspace(tmp_path)
    config = workspace.make_config(gradient_checkpointing="auto", **workspace.method_keys(method))
    reset_accelerate()
    run = build_run(config)
    run.close()
    plan = make_plan(config, run.built.plan.placement)
    assert run.built.kernels == plan.kernels
    assert run.built.recomputation == plan.recomputation
    assert run.prepared.attention == plan.kernels.attention
    assert run.target_loss.kind == plan.kernels.loss
    assert bool(run.prepared.compilation) == plan.kernels.compiles


def test_a_kernel_that_a_run_would_refuse_is_refused_by_the_plan(make_config):
    for keys, engine in (({"compile": "true"}, "zero2"), ({"attention": "documents"}, "ddp")):
        placement = DEVICES["cuda without bf16"]
        placement = Placement(placement.device, placement.precision, engine, 2)
        with pytest.raises(ConfigError, match=next(iter(keys))):
            make_plan(make_config(**keys), placement)


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ({}, "off"),
        ({"room": {"selective", "full"}}, "selective"),
        ({"room": {"full"}}, "full"),
        ({"room": set()}, "full"),
        ({"room": {"selective", "full"}, "engine": "zero3"}, "full"),
        ({"offloads": True}, "full"),
        ({"launcher_recomputes": True}, "off"),
        ({"wanted": "selective", "room": set()}, "selective"),
    ],
)
def test_recomputation_is_the_fastest_that_fits(keys, mode):
    keys = {
        "wanted": "auto",
        "engine": "ddp",
        "offloads": False,
        "launcher_recomputes": False,
        **keys,
    }
    room = keys.pop("room", {"off", "selective", "full"})
    assert activations.choose(keys.pop("wanted"), fits=room.__contains__, **keys) == mode
