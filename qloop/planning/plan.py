"""Estimates the memory, disk space and time of a run before it starts, from shapes alone.

Memory is measured by `simulation.py`, which runs the real step on tensors without memory. The
optimizer's state exists all the time and is added. With several processes, the training state is
divided as in `tests/benchmarks/arithmetic.py`; each has the activations of its own micro-batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from transformers import PreTrainedModel

from qloop.config.keys import KEYS, Config
from qloop.errors import ConfigError, PlanError, join_names
from qloop.hardware import DEVICES, Device, choose_precision, find_device
from qloop.model import activations, attention, compilation, loss
from qloop.model.activations import find_layers, set_recomputation
from qloop.model.attention import DOCUMENTS, AttentionChoice
from qloop.model.flops import build_model_flops
from qloop.optimizer import count_state_bytes
from qloop.planning.meta_model import build_meta_model
from qloop.planning.simulation import simulate_step
from qloop.steps import DEFAULT_MAX_STEPS
from qloop.storage.folders import show_bytes

CONTEXT_BYTES = {"cuda": 1_000_000_000, "cpu": 700_000_000}
"""Memory besides the tensors, estimated: CUDA's context and kernels, Python's libraries."""

HEAD_ROOM = 0.1
"""Share of the memory that `auto` leaves free for what an allocator wastes."""


@dataclass(frozen=True)
class Placement:
    """Where a run is to compute: the device, how many of them, and under which engine."""

    device: Device
    precision: str
    engine: str = "ddp"
    """`ddp` (a single process too), `fsdp2`, `zero2` or `zero3`."""
    num_processes: int = 1
    micro_batches: int | None = None
    """Of the whole run, on each process; None: as the config says."""
    launcher_recomputes: bool = False
    """Whether accelerate's FSDP plugin recomputes the layers."""


class Kernels(NamedTuple):
    """The attention, loss and compilation of a run, as far as shapes decide."""

    attention: AttentionChoice
    loss: str
    """A kind of `qloop.model.loss`."""
    compiles: bool
    """Whether the decoder layers are compiled."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of a run on each device of a placement."""

    config: Config
    placement: Placement
    kernels: Kernels
    recomputation: str
    """off, selective or full."""
    parts: dict[str, int]
    """Bytes alive at the peak, by `simulation.PARTS`."""
    checkpoint_bytes: int
    step_flops: int | None
    """Model FLOPs of a step over all processes, with every block one full document; None where they
    cannot be counted."""
    forward_flops: int | None
    """Model FLOPs of the layers' forward pass."""

    @property
    def peak_bytes(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.parts.values())

    @property
    def spare_bytes(self) -> int:
        """Memory of the device minus peak and context; negative if the run does not fit."""
        device = self.placement.device
        return device.memory_bytes - self.peak_bytes - CONTEXT_BYTES[device.kind]

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.spare_bytes >= 0

    @property
    def steps(self) -> int:
        """Steps of the whole run, as far as the config alone tells."""
        return self.config.schedule.max_steps or DEFAULT_MAX_STEPS

    def describe_parts(self) -> str:
        """Returns the parts of the peak: `parameters 20.2 MB, optimizer 40.4 MB, ...`."""
        return ", ".join(f"{part} {show_bytes(n)}" for part, n in self.parts.items() if n)


def find_placement(
    config: Config, name: str | None, memory_gb: float | None, num_processes: int, engine: str
) -> Placement:
    """Finds the devices that a user names; without a name, those of this machine.

    Raises:
        ConfigError: The name is unknown.
    """
    here = find_device()
    if name is None or name == here.kind:
        device = here
    elif name == "cpu":
        device = Device("CPU", "cpu", int(psutil.virtual_memory().total))
    elif name in DEVICES:
        device = DEVICES[name]
    else:
        known = join_names([*DEVICES, "cpu"])
        raise ConfigError(f"--device: unknown {name}; choose {known}, and --device_memory_gb")
    if memory_gb is not None:
        device = device._replace(memory_bytes=int(memory_gb * 1e9))
    precision: str = config.model.precision
    if precision == "auto" and device == here:
        precision = choose_precision(precision, torch.device(device.kind))
    elif precision == "auto":
        precision = "bf16" if device.kind == "cuda" else "fp32"
    return Placement(device, precision, engine, num_processes)


def choose_kernels(model: Any, config: Config, placement: Placement) -> Kernels:
    """Chooses for a model with or without values: the run and its plan both call this.

    What only values can show (documents that see each other, a compiler that fails) is tried when
    the run starts, and falls back with a reason.

    Raises:
        ConfigError: A key asks for a kernel that this model or device rules out.
    """
    settings, batch, device_type = config.model, config.batch, placement.device.kind
    micro_batches = placement.micro_batches
    if micro_batches is None:
        steps = config.schedule.max_steps or DEFAULT_MAX_STEPS
        micro_batches = steps * batch.gradient_accumulation_steps
    logits = batch.batch_size * config.data.max_seq_length
    logits *= model.config.get_text_config().vocab_size
    return Kernels(
        attention.choose(
            settings.attention, model, device_type=device_type, precision=placement.precision
        ),
        loss.choose(
            settings.loss,
            device_type=device_type,
            logits_bytes=4 * logits,
            may_compile=settings.compile is not False,
        ),
        compilation.choose(
            settings.compile,
            model,
            device_type=device_type,
            engine=placement.engine,
            offloads=settings.offload_activations,
            micro_batches=micro_batches,
        ),
    )


def choose_recomputation(
    config: Config, placement: Placement, fits: Callable[[str], bool] = lambda _: False
) -> str:
    """Chooses `off`, `selective` or `full`; without a plan, `auto` takes the smallest.

    Args:
        config: The whole config.
        placement: Where the run computes.
        fits: Whether the run has room with a mode.
    """
    return activations.choose(
        str(config.model.gradient_checkpointing),
        engine=placement.engine,
        offloads=config.model.offload_activations,
        launcher_recomputes=placement.launcher_recomputes,
        fits=fits,
    )


def make_plan(config: Config, placement: Placement) -> Plan:
    """Plans a run; `gradient_checkpointing = "auto"` takes the fastest mode that fits.

    Raises:
        ConfigError: The model cannot be found or built.
        PlanError: The model cannot be simulated.
    """
    plans: dict[str, Plan] = {}

    def fits(mode: str) -> bool:
        plans[mode] = plan_with(config, placement, mode)
        return plans[mode].spare_bytes >= HEAD_ROOM * placement.device.memory_bytes

    mode = choose_recomputation(config, placement, fits)
    return plans.get(mode) or plan_with(config, placement, mode)


def plan_with(config: Config, placement: Placement, recomputation: str) -> Plan:
    """Plans a run with a given mode of recomputation.

    Raises:
        ConfigError: The model cannot be found or built.
        PlanError: The model cannot be simulated.
    """
    batch, length = config.batch, config.data.max_seq_length
    model = build_meta_model(config.model, config.lora, placement.precision)
    flops = build_model_flops(model)
    sizes = _count_sizes(model)
    kernels = choose_kernels(model, config, placement)
    optimizer_bytes = count_state_bytes(model, config.optimizer.optimizer)
    simulated = "full" if placement.launcher_recomputes else recomputation
    parts = _simulate(model, config, placement, kernels, simulated)
    parts["optimizer"] = optimizer_bytes
    if placement.num_processes > 1:
        parts = _divide_state(parts, placement, sizes)
    blocks = batch.batch_size * batch.gradient_accumulation_steps * placement.num_processes
    lengths = np.full(blocks, length)
    saves_adapters = config.model.training_method != "full"
    return Plan(
        config=config,
        placement=placement,
        kernels=kernels,
        recomputation=recomputation,
        parts=parts,
        checkpoint_bytes=(4 * sizes.trained if saves_adapters else sizes.all_bytes)
        + optimizer_bytes,
        step_flops=None if flops is None else flops.of(lengths),
        forward_flops=None if flops is None else flops.linear.forward * int(lengths.sum()),
    )


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Sizes of a model before it is simulated."""

    trained: int
    """Trained parameters, of 4 bytes each."""
    all_bytes: int
    largest_unit: int
    """Parameters of the largest layer, embedding or head: the unit that FSDP2 gathers."""


def _count_sizes(model: PreTrainedModel) -> _Sizes:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    units = [*find_layers(model), *(end for end in ends if isinstance(end, torch.nn.Module))]
    return _Sizes(
        trained=sum(math.prod(p.shape) for p in model.parameters() if p.requires_grad),
        all_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        largest_unit=max((sum(p.numel() for p in unit.parameters()) for unit in units), default=0),
    )


def _simulate(
    model: Any, config: Config, placement: Placement, kernels: Kernels, mode: str
) -> dict[str, int]:
    """Returns the bytes alive at the peak of a step by part; the model is unusable afterwards."""
    batch, length = config.batch, config.data.max_seq_length
    if placement.engine != "ddp" and placement.precision == "bf16":
        model = model.to(torch.bfloat16)  # the type that layers compute in; the masters are added
    if kernels.attention.name in (DOCUMENTS, "eager"):  # other kernels take about as much memory
        model.set_attn_implementation(kernels.attention.name)
    # A layer that is recomputed as a whole keeps the same, compiled or not.
    compiled = mode if kernels.compiles and mode != "full" else None
    if compiled is None:
        set_recomputation(model, mode)
    config_of_text = model.config.get_text_config()
    hidden_bytes = model.get_input_embeddings().weight.element_size()
    hidden_bytes *= batch.batch_size * length * config_of_text.hidden_size
    layers = len(find_layers(model))
    try:
        parts = simulate_step(
            model,
            kernels.loss,
            placement.device.kind,
            batch.batch_size,
            length,
            placement.precision,
            accumulates=batch.gradient_accumulation_steps > 1,
            compiled=compiled,
        )
    except Exception as error:  # whatever a model's own code does with tensors without values
        if compiled is not None:  # such layers may fail to compile in the run, too
            model = build_meta_model(config.model, config.lora, placement.precision)
            return _simulate(model, config, placement, kernels._replace(compiles=False), mode)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"not planned: {type(model).__name__} does not run on tensors without values: {reason}"
        ) from error
    if config.model.offload_activations and placement.device.kind == "cuda":
        parts["activations"] -= (layers - 1) * hidden_bytes  # all but the one being copied
    return parts


def _divide_state(parts: dict[str, int], placement: Placement, sizes: _Sizes) -> dict[str, int]:
    """Divides the training state over the processes, as the engine does."""
    n, trained = placement.num_processes, sizes.trained
    frozen_bytes = sizes.all_bytes - 4 * trained
    gathered = 2 * 2 * sizes.largest_unit  # two units in bf16
    if placement.engine == "ddp":  # which sends gradients from buckets of its own
        return {**parts, "gradients": parts["gradients"] + 4 * trained}
    if placement.engine == "fsdp2":
        return {
            **parts,
            "parameters": (frozen_bytes + 4 * trained) // n,
            "gradients": 4 * trained // n,
            "optimizer": parts["optimizer"] // n,
            "working": parts["working"] + gathered,
        }
    # DeepSpeed computes with bf16 weights, and keeps fp32 ones with the optimizer.
    weights = frozen_bytes + 2 * trained
    is_sharded = placement.engine == "zero3"
    return {
        **parts,
        "parameters": weights // n if is_sharded else weights,
        "gradients": 4 * trained // n,
        "optimizer": (parts["optimizer"] + 4 * trained) // n,
        "working": parts["working"] + (gathered if is_sharded else 0),
    }


def change_config(config: Config, changes: dict[str, Any]) -> Config:
    """Returns a config with other values, which are not checked for contradictions."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        sections.setdefault(KEYS[key].section, {})[key] = value
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=values)
            for section, values in sections.items()
        }
    )
