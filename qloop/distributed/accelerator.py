"""Builds the accelerator that the launcher asks for, and the engine of a model."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations import unset_hf_deepspeed_config

from qloop.config.keys import BatchConfig, ModelConfig, OptimizerConfig
from qloop.distributed.engine import Engine
from qloop.errors import ConfigError
from qloop.hardware import choose_precision
from qloop.optimizer import Optimizers, build_optimizer, split_by_optimizer


def build_accelerator(
    model: ModelConfig, batch: BatchConfig, optimizer: OptimizerConfig
) -> Accelerator:
    """Builds the accelerator for this machine; without a GPU there may still be several ranks.

    Raises:
        ConfigError: qloop does not support the launcher's engine, at all or with this config.
    """
    cpu = not torch.accelerator.is_available()
    device = torch.device("cpu" if cpu else torch.accelerator.current_accelerator() or "cpu")
    precision = choose_precision(model.precision, device)
    accelerator = _accelerate(
        # With cpu=True, accelerate ignores FSDP and DeepSpeed without an error.
        cpu=cpu and not _asks_for("FSDP") and not _asks_for("DEEPSPEED"),
        mixed_precision="bf16" if precision == "bf16" else "no",
        # A plugin: a plain number would be overridden by an environment variable of the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=batch.gradient_accumulation_steps,
            sync_with_dataloader=False,
            # Reduces after every micro-batch; otherwise each rank would hold the whole gradient.
            sync_each_batch=_asks_for("FSDP"),
        ),
        # The other ranks wait while the main one tokenises; peers.py notices a dead one.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=24)),
            # Each weight is cast once, where it is used. A cache would keep all bf16 copies until
            # the forward pass ends: 15 GB for a 7 B model.
            AutocastKwargs(cache_enabled=False),
        ],
    )
    kind = accelerator.distributed_type
    asked = next((engine for engine in ("FSDP", "DEEPSPEED") if _asks_for(engine)), None)
    is_alone = accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1"))
    if asked and (kind != asked or is_alone):  # every process would start a run of its own
        raise ConfigError(
            f"accelerate launch: {asked} needs GPUs, and this machine has none; launch with "
            "launch/cpu_two_processes.yaml"
        )
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ConfigError(f"accelerate launch: {kind.value} is not supported; see launch/*.yaml")
    _refuse_optimizer(optimizer.optimizer, kind, accelerator.device)
    if kind == DistributedType.FSDP:
        _set_up_fsdp(accelerator, model)
    if kind == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator, model, batch, optimizer)
    return accelerator


def reads_weights(accelerator: Accelerator) -> bool:
    """Whether this rank reads the base's weights; under FSDP2, one rank of each machine does."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return True
    sends = accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    return bool(accelerator.is_local_main_process or not sends)


def build_engine(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: OptimizerConfig, accumulation: int
) -> Engine:
    """Builds the optimizer, and wraps or shards the model as the launcher asks.

    The model may be on the CPU. `accumulation` is the number of micro-batches per rank and step,
    see `steps.divide_step`.
    """
    accelerator.gradient_accumulation_steps = accumulation
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from qloop.distributed.zero import ZeroEngine

        plugin = accelerator.state.deepspeed_plugin.deepspeed_config
        plugin["gradient_accumulation_steps"] = accumulation
        return ZeroEngine(accelerator, *_prepare(accelerator, model, optimizer))
    if kind != DistributedType.FSDP:  # FSDP moves the model shard by shard
        model = model.to(accelerator.device)
    return Engine(accelerator, *_prepare(accelerator, model, optimizer))


def name_engine(accelerator: Accelerator) -> str:
    """Returns `ddp` (for a single process too), `fsdp2`, `zero2` or `zero3`."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        return "fsdp2"
    if kind == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    return "ddp"


def launcher_recomputes(accelerator: Accelerator) -> bool:
    """Whether accelerate's FSDP plugin recomputes the layers."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.activation_checkpointing)


def _accelerate(**options: Any) -> Accelerator:
    try:
        return Accelerator(**options)
    except ImportError as error:  # of DeepSpeed, which qloop does not install
        raise ConfigError(
            f"accelerate launch: {error}; install it (pip install 'qloop[deepspeed]'), or launch "
            "with launch/fsdp2.yaml"
        ) from error


def _prepare(accelerator: Accelerator, model: torch.nn.Module, settings: OptimizerConfig) -> Any:
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_thin_matrices(model, settings.optimizer, accelerator.num_processes)
    optimizer = build_optimizer(model, settings)
    prepared, *each = accelerator.prepare(model, *optimizer.each)
    return prepared, Optimizers(each)


def _asks_for(engine: str) -> bool:
    """Whether the config of `accelerate launch` asks for `FSDP` or `DEEPSPEED`."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _refuse_optimizer(optimizer: str, kind: DistributedType, device: torch.device) -> None:
    if kind == DistributedType.DEEPSPEED and optimizer != "adamw":
        raise ConfigError(
            f"optimizer: {optimizer} does not run under DeepSpeed, whose partitions only adamw "
            "can update; use adamw, or launch with launch/multi_gpu.yaml"
        )
    is_bitsandbytes = optimizer in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
    if kind == DistributedType.FSDP and is_bitsandbytes:
        raise ConfigError(
            f"optimizer: {optimizer} does not run under FSDP2, whose sharded weights bitsandbytes "
            "cannot update; use adamw or muon, or launch with launch/multi_gpu.yaml"
        )
    if is_bitsandbytes and device.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"optimizer: {optimizer} runs on CUDA GPUs and on a CPU; this run computes on "
            f"{device.type}: use adamw"
        )
    if optimizer.startswith("paged") and device.type != "cuda":
        raise ConfigError(
            f"optimizer: {optimizer} needs a CUDA GPU, whose memory it pages; this run computes on "
            f"{device.type}: use {optimizer.removeprefix('paged_')}"
        )


def _refuse_thin_matrices(model: torch.nn.Module, optimizer: str, num_ranks: int) -> None:
    """Refuses a matrix with fewer rows than ranks: Muon needs a row on each rank."""
    for name, parameter in split_by_optimizer(model, optimizer).get("muon", {}).items():
        if len(parameter) < num_ranks:
            raise ConfigError(
                f"optimizer: muon cannot divide the {len(parameter)} rows of {name} over "
                f"{num_ranks} processes under FSDP2; use adamw, or fewer processes"
            )


def _set_up_fsdp(accelerator: Accelerator, model: ModelConfig) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "accelerate launch: fsdp_version is 1; qloop shards by FSDP2 only: set fsdp_version: 2 "
            "in the accelerate config, as launch/fsdp2.yaml does"
        )
    if accelerator.mixed_precision == "bf16":
        # Accelerate's default would sum gradients in bf16.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    recomputes = model.gradient_checkpointing in ("full", "selective")
    if plugin.activation_checkpointing and recomputes:
        raise ConfigError(
            "accelerate launch: fsdp_activation_checkpointing recomputes the "
            "layers that gradient_checkpointing recomputes already; turn one of them off"
        )


def _set_up_deepspeed(
    accelerator: Accelerator, model: ModelConfig, batch: BatchConfig, optimizer: OptimizerConfig
) -> None:
    if model.training_method == "qlora":
        raise ConfigError(
            "training_method: qlora does not run under DeepSpeed, which cannot shard 4-bit "
            "weights; launch with launch/multi_gpu.yaml, or use lora"
        )
    plugin = accelerator.state.deepspeed_plugin.deepspeed_config
    for key in ("optimizer", "scheduler"):
        if key in plugin:
            raise ConfigError(
                f"accelerate launch: the DeepSpeed config has its own {key}; qloop builds one from "
                "its own keys: remove it"
            )
    if plugin.get("fp16", {}).get("enabled") is True:
        raise ConfigError(
            "accelerate launch: the DeepSpeed config turns fp16 on; qloop computes in bf16 or fp32 "
            "(key precision): remove it"
        )
    if plugin["zero_optimization"]["stage"] == 0:
        raise ConfigError("accelerate launch: zero_stage is 0; use launch/multi_gpu.yaml instead")
    is_stage_3 = plugin["zero_optimization"]["stage"] == 3
    if is_stage_3 and model.gradient_checkpointing == "selective":
        raise ConfigError(
            "gradient_checkpointing: selective does not run under ZeRO-3, which gathers weights "
            "between the operators that it keeps; use full"
        )
    # With ZeRO-3 set, transformers would shard a model while building it, and draw other weights.
    unset_hf_deepspeed_config()
    plugin["train_micro_batch_size_per_gpu"] = batch.batch_size
    plugin["train_batch_size"] = "auto"
    plugin["gradient_clipping"] = optimizer.max_grad_norm
    if accelerator.mixed_precision == "bf16":
        # DeepSpeed's default would sum gradients in bf16, over micro-batches and over ranks.
        plugin["data_types"] = {"grad_accum_dtype": "fp32"}
        plugin["communication_data_type"] = "fp32"
