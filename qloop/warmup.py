"""Compiles the layers before step 1, on that step's own first micro-batch.

So the first step takes as long as any other, and what cannot be compiled is known before it.
"""

import time

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from qloop.config.keys import ModelConfig
from qloop.data.batches import MicroBatch
from qloop.distributed.engine import Engine
from qloop.distributed.ranks import on_all
from qloop.errors import ConfigError
from qloop.model.activations import find_layers
from qloop.model.compilation import (
    compile_layers,
    count_compilations,
    is_worthwhile,
    uncompile_layers,
)
from qloop.model.loss import TargetLoss
from qloop.steps import seed_forward_pass


def compiles(
    config: ModelConfig, accelerator: Accelerator, engine: Engine, micro_batches: int
) -> bool:
    """Says whether this run compiles its layers.

    Raises:
        ConfigError: It was asked for, and cannot be.
    """
    reason = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        reason = "DeepSpeed changes the layers while they run"
    elif not find_layers(engine.unwrapped):
        reason = f"{type(engine.unwrapped).__name__} does not say what its layers are"
    if config.compile is True and reason:
        raise ConfigError(f"compile: {reason}; use auto or false")
    return reason is None and is_worthwhile(config, accelerator.device.type, micro_batches)


def compile_and_warm_up(
    engine: Engine,
    accelerator: Accelerator,
    loss: TargetLoss,
    micro_batch: MicroBatch,
    is_wanted: bool,
) -> str:
    """Compiles the layers and makes one forward and backward pass whose gradients are dropped.

    Args:
        engine: Its model is compiled in place.
        accelerator: The ranks.
        loss: The model's.
        micro_batch: Any of the run, not yet on the device.
        is_wanted: False goes on uncompiled where compiling fails.

    Returns:
        How it went, for the opening lines.

    Raises:
        ConfigError: It failed and `is_wanted`.
    """
    started, before = time.perf_counter(), count_compilations()

    def run() -> None:
        seed_forward_pass(0)
        compile_layers(engine.unwrapped)
        try:
            engine.backward(loss.sum(engine.model, micro_batch.to(accelerator.device)) * 0.0)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of many kinds: no compiler, no Triton, a layer's own code
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(f"compile: the layers cannot be compiled: {reason}") from error

    was_training = engine.model.training
    engine.model.train()
    try:
        on_all(accelerator, run)
        made = count_compilations() - before
        return f"compiled   layers, {made} graphs in {time.perf_counter() - started:.0f} s"
    except ConfigError as error:
        uncompile_layers(engine.unwrapped)
        if is_wanted:
            raise
        return f"compiled   nothing: {error}; layers may keep more than is planned"
    finally:
        engine.optimizer.zero_grad()
        engine.model.train(was_training)
