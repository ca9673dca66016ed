"""Builds the accelerator that the launcher asks for, and the engine of model and optimizer."""

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

from qloop.config.keys import Config
from qloop.distributed.engine import Engine
from qloop.errors import ConfigError
from qloop.hardware import choose_precision, use_deterministic_kernels
from qloop.optimizer import Optimizers, build_optimizer, split_by_optimizer


def build_accelerator(config: Config) -> Accelerator:
    """Builds the accelerator for the machine it finds; one without a GPU may still have ranks.

    Raises:
        ConfigError: The launcher asks for an engine that qloop does not run on.
    """
    if config.run.deterministic:
        use_deterministic_kernels()
    cpu = not torch.accelerator.is_available()
    device = torch.device("cpu" if cpu else torch.accelerator.current_accelerator() or "cpu")
    precision = choose_precision(config.model.precision, device)
    accelerator = _accelerate(
        # Accelerate leaves FSDP and DeepSpeed out, without a word, where it is told of a CPU.
        cpu=cpu and not _asks_for("FSDP") and not _asks_for("DEEPSPEED"),
        mixed_precision="bf16" if precision == "bf16" else "no",
        # As a plugin: a plain number would yield to an environment variable of the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.batch.gradient_accumulation_steps,
            sync_with_dataloader=False,
            # Sharded at every micro-batch: between two, each rank would hold the whole gradient.
            sync_each_batch=_asks_for("FSDP"),
        ),
        # The others wait while the main rank tokenises; a dead one is noticed by peers.py.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=24)),
            # Each weight is cast where it is used, once. Cached, all bf16 copies would lie there
            # until the forward pass ends: 15 GB of a 7 B model.
            AutocastKwargs(cache_enabled=False),
        ],
    )
    kind = accelerator.distributed_type
    asked = next((engine for engine in ("FSDP", "DEEPSPEED") if _asks_for(engine)), None)
    is_alone = accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1"))
    if asked and (kind != asked or is_alone):  # each process would make a run of its own
        raise ConfigError(
            f"accelerate launch: {asked} was asked for, but needs GPUs, and none is here; launch "
            "with launch/cpu_two_processes.yaml"
        )
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ConfigError(f"accelerate launch: {kind.value} is not supported; see launch/*.yaml")
    _refuse_optimizer(config.optimizer.optimizer, kind, accelerator.device)
    if kind == DistributedType.FSDP:
        _set_up_fsdp(accelerator, config)
    if kind == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator, config)
    return accelerator


def reads_weights(accelerator: Accelerator) -> bool:
    """Whether this rank reads a model that is to be built; under FSDP2 one of a machine does."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return True
    sends = accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    return bool(accelerator.is_local_main_process or not sends)


def build_engine(
    accelerator: Accelerator, model: torch.nn.Module, config: Config, accumulation: int
) -> Engine:
    """Shards or wraps the model as the launcher asks for, with its optimizer.

    Args:
        accelerator: From `build_accelerator`.
        model: On the CPU, or on the device.
        config: The whole config.
        accumulation: Micro-batches in a step of a rank; the config's where no checkpoint says
            otherwise.
    """
    accelerator.gradient_accumulation_steps = accumulation
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from qloop.distributed.zero import ZeroEngine

        plugin = accelerator.state.deepspeed_plugin.deepspeed_config
        plugin["gradient_accumulation_steps"] = accumulation
        return ZeroEngine(accelerator, *_prepare(accelerator, model, config))
    if kind != DistributedType.FSDP:  # which takes a model to the device shard by shard
        model = model.to(accelerator.device)
    return Engine(accelerator, *_prepare(accelerator, model, config))


def describe_engine(accelerator: Accelerator) -> str:
    """Names the engine as people do: `DDP`; nothing for a single process."""
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        return "FSDP2"
    if kind == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return "DDP" if accelerator.num_processes > 1 else ""


def _accelerate(**options: Any) -> Accelerator:
    try:
        return Accelerator(**options)
    except ImportError as error:  # of DeepSpeed, which is no part of qloop
        raise ConfigError(
            f"accelerate launch: {error}; install it (pip install 'qloop[deepspeed]'), or launch "
            "with launch/fsdp2.yaml"
        ) from error


def _prepare(accelerator: Accelerator, model: torch.nn.Module, config: Config) -> Any:
    if accelerator.distributed_type == DistributedType.FSDP:
        _refuse_thin_matrices(model, config.optimizer.optimizer, accelerator.num_processes)
    optimizer = build_optimizer(model, config.optimizer)
    prepared, *each = accelerator.prepare(model, *optimizer.each)
    return prepared, Optimizers(each)


def _asks_for(engine: str) -> bool:
    """Whether `accelerate launch` was told to use it."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _refuse_optimizer(optimizer: str, kind: DistributedType, device: torch.device) -> None:
    """Refuses an optimizer that this engine or this device does not make right steps with.

    Raises:
        ConfigError: It does not run here; says what does.
    """
    if kind == DistributedType.DEEPSPEED and optimizer != "adamw":
        raise ConfigError(
            f"optimizer: {optimizer} does not run under DeepSpeed, which cuts weights into flat "
            "pieces that only adamw can update; use adamw, or launch with launch/multi_gpu.yaml"
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
            f"optimizer: {optimizer} needs a CUDA GPU, whose memory it lends out; this run "
            f"computes on {device.type}: use {optimizer.removeprefix('paged_')}"
        )


def _refuse_thin_matrices(model: torch.nn.Module, optimizer: str, num_ranks: int) -> None:
    """Refuses matrices of which some ranks would hold no row: torch's Muon cannot update those.

    Raises:
        ConfigError: There is one; its name.
    """
    for name, parameter in split_by_optimizer(model, optimizer).get("muon", {}).items():
        if len(parameter) < num_ranks:
            raise ConfigError(
                f"optimizer: muon cannot cut {name} of {len(parameter)} rows over {num_ranks} "
                "processes under FSDP2; use adamw, or fewer processes"
            )


def _set_up_fsdp(accelerator: Accelerator, config: Config) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "accelerate launch: fsdp_version is 1; qloop shards by FSDP2 only: set fsdp_version: 2 "
            "in the accelerate config, as launch/fsdp2.yaml does"
        )
    if accelerator.mixed_precision == "bf16":
        # Accelerate would sum gradients in bf16 too.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    recomputes = config.model.gradient_checkpointing in ("full", "selective")
    if plugin.activation_checkpointing and recomputes:
        raise ConfigError(
            "accelerate launch: fsdp_activation_checkpointing recomputes what "
            "gradient_checkpointing recomputes already; turn one of them off"
        )


def _set_up_deepspeed(accelerator: Accelerator, config: Config) -> None:
    if config.model.training_method == "qlora":
        raise ConfigError(
            "training_method: qlora does not run under DeepSpeed, which cannot shard 4-bit "
            "weights; launch with launch/multi_gpu.yaml, or use lora"
        )
    plugin = accelerator.state.deepspeed_plugin.deepspeed_config
    for key in ("optimizer", "scheduler"):
        if key in plugin:
            raise ConfigError(
                f"accelerate launch: the DeepSpeed config has its own {key}; qloop brings one, "
                "with the keys of its config: take it out"
            )
    if plugin.get("fp16", {}).get("enabled") is True:
        raise ConfigError(
            "accelerate launch: the DeepSpeed config turns fp16 on; qloop computes in bf16 or fp32 "
            "(precision): take it out"
        )
    if plugin["zero_optimization"]["stage"] == 0:
        raise ConfigError("accelerate launch: zero_stage is 0; use launch/multi_gpu.yaml instead")
    if (
        plugin["zero_optimization"]["stage"] == 3
        and config.model.gradient_checkpointing == "selective"
    ):
        raise ConfigError(
            "gradient_checkpointing: selective does not run under ZeRO-3, which gathers weights "
            "between the operators that it keeps; use full"
        )
    # Told of ZeRO-3, transformers would cut a model while it is built, and draw other new weights.
    unset_hf_deepspeed_config()
    plugin["train_micro_batch_size_per_gpu"] = config.batch.batch_size
    plugin["train_batch_size"] = "auto"
    plugin["gradient_clipping"] = config.optimizer.max_grad_norm
    if accelerator.mixed_precision == "bf16":
        # DeepSpeed would sum gradients in bf16, over micro-batches and over ranks.
        plugin["data_types"] = {"grad_accum_dtype": "fp32"}
        plugin["communication_data_type"] = "fp32"
