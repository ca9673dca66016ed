"""What a launcher may ask for, and what is refused; the engines themselves run in distributed/."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
)

from qloop.config.keys import BatchConfig, ModelConfig, OptimizerConfig
from qloop.config.loading import load_config
from qloop.distributed.accelerator import (
    _refuse_optimizer,
    _refuse_thin_matrices,
    _set_up_deepspeed,
    _set_up_fsdp,
    build_accelerator,
    name_engine,
    reads_weights,
)
from qloop.errors import ConfigError
from qloop.run import build_run

LAUNCH = Path(__file__).parents[2] / "launch"


def model(**keys: str) -> ModelConfig:
    return load_config(None, keys).config.model


def sections(**keys: str) -> tuple[ModelConfig, BatchConfig, OptimizerConfig]:
    config = load_config(None, keys).config
    return config.model, config.batch, config.optimizer


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("fsdp2.yaml", "FSDP"),
        # DeepSpeed builds a library of its own first.
        pytest.param("deepspeed_zero2.yaml", "DEEPSPEED", marks=pytest.mark.distributed),
    ],
)
def test_an_engine_for_gpus_is_refused_where_there_is_none(tmp_path, file, engine):
    """Accelerate would train without it, or make a run of each process, and say nothing."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH / file),
            *("--num_processes", "2", "--main_process_port", "0"),
            *("-m", "qloop", "train", "--output_dir", tmp_path),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{engine} needs GPUs, and this machine has none; launch with" in done.stderr
    assert "exitcode  : 78" in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_process_has_no_engine_by_name_and_reads_the_weights():
    accelerator = build_accelerator(*sections())
    assert name_engine(accelerator) == "ddp"
    assert reads_weights(accelerator)


@pytest.mark.parametrize(
    ("optimizer", "kind", "device", "message"),
    [
        ("muon", "DEEPSPEED", "cuda", "muon does not run under DeepSpeed.*use adamw, or launch"),
        ("adamw_8bit", "DEEPSPEED", "cuda", "adamw_8bit does not run under DeepSpeed"),
        ("adamw_8bit", "FSDP", "cuda", "adamw_8bit does not run under FSDP2.*use adamw or muon"),
        ("paged_adamw", "FSDP", "cuda", "paged_adamw does not run under FSDP2"),
        ("paged_adamw", "NO", "cpu", "paged_adamw needs a CUDA GPU.*on cpu: use adamw$"),
        ("paged_adamw_8bit", "NO", "cpu", "paged_adamw_8bit needs.*on cpu: use adamw_8bit$"),
        ("paged_adamw", "NO", "mps", "paged_adamw runs on CUDA GPUs.*computes on mps: use adamw$"),
    ],
)
def test_an_optimizer_is_refused_where_it_makes_no_right_steps(optimizer, kind, device, message):
    with pytest.raises(ConfigError, match=f"^optimizer: {message}"):
        _refuse_optimizer(optimizer, DistributedType(kind), torch.device(device))


@pytest.mark.parametrize(
    ("optimizer", "kind", "device"),
    [
        ("adamw", "DEEPSPEED", "cuda"),
        ("adamw", "FSDP", "mps"),
        ("muon", "FSDP", "cuda"),
        ("muon", "MULTI_GPU", "cpu"),
        ("adamw_8bit", "MULTI_GPU", "cpu"),
        ("paged_adamw_8bit", "MULTI_GPU", "cuda"),
    ],
)
def test_an_optimizer_is_taken_where_it_does(optimizer, kind, device):
    _refuse_optimizer(optimizer, DistributedType(kind), torch.device(device))


def test_a_paged_optimizer_is_refused_on_a_cpu_before_anything_is_read(tmp_path):
    missing = {"model_name": str(tmp_path / "none"), "train_file": str(tmp_path / "none")}
    flags = {**missing, "output_dir": str(tmp_path), "optimizer": "paged_adamw_8bit"}
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "qloop", "train", *words],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    assert "paged_adamw_8bit needs a CUDA GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_matrix_of_fewer_rows_than_ranks_is_refused_by_name_under_muon(make_config):
    run = build_run(make_config())
    run.close()
    _refuse_thin_matrices(run.model, "muon", 16)
    _refuse_thin_matrices(run.model, "adamw", 17)
    with pytest.raises(
        ConfigError,
        match=r"cannot divide the 16 rows of model\.layers\.0\.self_attn\.k_proj\.weight",
    ):
        _refuse_thin_matrices(run.model, "muon", 17)


def of_fsdp(**keys) -> SimpleNamespace:
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **keys})
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no")


def test_only_the_second_version_of_fsdp_is_taken():
    with pytest.raises(ConfigError, match="fsdp_version is 1"):
        _set_up_fsdp(of_fsdp(fsdp_version=1), model())


def test_recomputing_twice_is_refused():
    with pytest.raises(ConfigError, match="turn one of them off"):
        _set_up_fsdp(of_fsdp(activation_checkpointing=True), model(gradient_checkpointing="full"))
    for mode in ("off", "auto"):
        _set_up_fsdp(of_fsdp(activation_checkpointing=True), model(gradient_checkpointing=mode))


def test_fsdp_sums_gradients_in_fp32():
    accelerator = of_fsdp()
    accelerator.mixed_precision = "bf16"
    _set_up_fsdp(accelerator, model())
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def of_deepspeed(**keys) -> SimpleNamespace:
    plugin = DeepSpeedPlugin(zero_stage=2)
    plugin.deepspeed_config.update(keys)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision="no")


def test_deepspeed_is_told_what_qloop_knows():
    accelerator = of_deepspeed()
    accelerator.mixed_precision = "bf16"
    _set_up_deepspeed(accelerator, *sections(batch_size="3", max_grad_norm="0.7"))
    told = accelerator.state.deepspeed_plugin.deepspeed_config
    assert told["train_micro_batch_size_per_gpu"] == 3
    assert told["gradient_clipping"] == 0.7
    assert told["data_types"] == {"grad_accum_dtype": "fp32"}
    assert told["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "has its own optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "has its own scheduler"),
        ({"fp16": {"enabled": True}}, "turns fp16 on"),
        ({"zero_optimization": {"stage": 0}}, "zero_stage is 0"),
    ],
)
def test_a_deepspeed_config_that_contradicts_qloop_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        _set_up_deepspeed(of_deepspeed(**keys), *sections())


def test_selective_recomputation_is_refused_under_zero_3_only():
    """It would find weights that were gathered in the forward pass missing in the backward."""
    selective = sections(gradient_checkpointing="selective")
    _set_up_deepspeed(of_deepspeed(), *selective)
    with pytest.raises(ConfigError, match="selective does not run under ZeRO-3"):
        _set_up_deepspeed(of_deepspeed(zero_optimization={"stage": 3}), *selective)


def test_qlora_is_refused_under_deepspeed():
    with pytest.raises(ConfigError, match="qlora does not run under DeepSpeed"):
        _set_up_deepspeed(of_deepspeed(), *sections(training_method="qlora"))


def test_a_missing_deepspeed_ends_in_a_message(monkeypatch):
    def lacks(**options: object) -> None:
        raise ImportError("DeepSpeed is not installed")

    monkeypatch.setattr("qloop.distributed.accelerator.Accelerator", lacks)
    with pytest.raises(ConfigError, match=r"DeepSpeed is not installed; install it \(pip install"):
        build_accelerator(*sections())
