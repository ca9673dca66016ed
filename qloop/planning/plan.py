"""What a run will need, before it: memory, disk and time, from shapes alone.

Memory comes from `simulation.py`: a step of the real code on tensors without memory. What the
optimizer keeps lies there all the time, and is added. Several processes share the state of training
as `tests/benchmarks/arithmetic.py` has it; each has the activations of its own micro-batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from qloop.config.keys import KEYS, Config
from qloop.errors import ConfigError, PlanError, join_names
from qloop.hardware import (
    DEVICES,
    Device,
    choose_precision,
    find_device,
)
from qloop.model.activations import find_layers, set_recomputation
from qloop.model.attention import DOCUMENTS, why_not_documents
from qloop.model.compilation import is_worthwhile
from qloop.model.flops import build_model_flops
from qloop.model.loss import choose_kind
from qloop.optimizer import count_state_bytes
from qloop.planning.meta_model import build_shapes
from qloop.planning.simulation import simulate_step
from qloop.storage.folders import show_bytes

CONTEXT_BYTES = {"cuda": 1_000_000_000, "cpu": 700_000_000}
"""Beside the tensors, about, and not measured: CUDA's context and kernels; Python's libraries."""

HEAD_ROOM = 0.1
"""Share of the memory that `auto` leaves free, for what an allocator wastes."""


ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


@dataclass(frozen=True)
class Placement:
    """A device, and how many of them how."""

    device: Device
    precision: str
    engine: str = "ddp"
    """One of ENGINES; without meaning for a single process."""
    num_processes: int = 1
    micro_batches: int | None = None
    """Of the whole run, on each; None: as its config says."""


@dataclass(frozen=True)
class Plan:
    """What a run of a config needs on each device of a placement."""

    config: Config
    placement: Placement
    activations: str
    """off, selective or full."""
    is_compiled: bool
    """Whether the layers are."""
    parts: dict[str, int]
    """Bytes alive at the peak, by PARTS."""
    checkpoint_bytes: int
    step_flops: int | None
    """Model FLOPs of a step of all processes, every block full with one document; None where they
    cannot be counted."""
    forward_flops: int | None
    """Those of the layers' forward pass."""

    @property
    def peak_bytes(self) -> int:
        """In tensors."""
        return sum(self.parts.values())

    @property
    def spare_bytes(self) -> int:
        """What the device has beyond peak and context; below 0 it does not fit."""
        device = self.placement.device
        return device.memory_bytes - self.peak_bytes - CONTEXT_BYTES[device.kind]

    @property
    def fits(self) -> bool:
        """Whether the device has room for it all."""
        return self.spare_bytes >= 0


def find_placement(
    config: Config, name: str | None, memory_gb: float | None, num_processes: int, engine: str
) -> Placement:
    """Finds the devices that a person names; the one here where none is named.

    Raises:
        ConfigError: The name is unknown.
    """
    here = find_device()
    if name is None or name == here.kind:
        device = here
    elif name == "cpu":
        device = Device("CPU", "cpu", int(psutil.virtual_memory().total))
    elif name in DEVICES:
        device = Device(DEVICES[name][0], "cuda", int(DEVICES[name][1]))
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


def make_plan(config: Config, placement: Placement) -> Plan:
    """Plans a run; `auto` in gradient_checkpointing takes what is fastest and fits.

    Raises:
        ConfigError: The model cannot be found or built.
        PlanError: It cannot be simulated.
    """
    wanted = str(config.model.gradient_checkpointing)
    if wanted != "auto":
        return plan_as(config, placement, wanted)
    modes = ["full"] if config.model.offload_activations else ["off", "selective", "full"]
    if placement.engine == "zero3" and "selective" in modes:
        modes.remove("selective")
    for mode in modes:
        plan = plan_as(config, placement, mode)
        if plan.spare_bytes >= HEAD_ROOM * placement.device.memory_bytes:
            break
    return plan


def plan_run(config: Config, placement: Placement) -> tuple[Plan | None, str]:
    """Plans a run that begins, and describes it in a line for its opening.

    No plan is no reason not to train: a model whose code asks tensors for values, say, cannot be
    simulated, and trains all the same.
    """
    try:
        plan = make_plan(config, placement)
    except PlanError as error:
        return None, f"memory     {error}"
    room = "" if plan.fits else "; it may not fit: see qloop plan"
    return plan, (
        f"memory     {show_bytes(plan.peak_bytes)} planned at the peak, of "
        f"{show_bytes(placement.device.memory_bytes)} ({name_parts(plan)}){room}"
    )


def _is_compiled(config: Config, placement: Placement) -> bool:
    if placement.engine in ("zero2", "zero3"):
        return False
    micro_batches = placement.micro_batches
    if micro_batches is None:
        micro_batches = planned_steps(config) * config.batch.gradient_accumulation_steps
    return is_worthwhile(config.model, placement.device.kind, micro_batches)


def plan_as(
    config: Config, placement: Placement, mode: str, is_compiled: bool | None = None
) -> Plan:
    """Plans a run that recomputes by a given mode."""
    if is_compiled is None:
        is_compiled = _is_compiled(config, placement)
    data, batch = config.data, config.batch
    model = build_shapes(config.model, config.lora, placement.precision)
    flops = build_model_flops(model)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    count = sum(map(math.prod, trained.values()))
    all_bytes = sum(parameter.nbytes for parameter in model.parameters())
    shares_weights = placement.engine in ("fsdp2", "zero2", "zero3")
    if shares_weights and placement.precision == "bf16":
        model = model.to(torch.bfloat16)  # what layers are given; the masters lie elsewhere
    largest_unit = max(map(_count_parameters, [*find_layers(model), *_ends(model)]), default=0)
    layers, rows = len(find_layers(model)), batch.batch_size * data.max_seq_length
    is_compiled = is_compiled and layers > 0
    _set_attention(model, config, placement)
    # A layer that is computed again as a whole keeps the same, compiled or not.
    compiled = mode if is_compiled and mode != "full" else None
    if compiled is None:
        set_recomputation(model, mode)
    vocabulary_size = model.config.get_text_config().vocab_size
    kind = choose_kind(
        config.model.loss, placement.device.kind, rows * vocabulary_size * 4,
        may_compile=config.model.compile is not False,
    )  # fmt: skip
    hidden_bytes = model.get_input_embeddings().weight.element_size()
    hidden_bytes *= rows * model.config.get_text_config().hidden_size
    try:
        parts = simulate_step(
            model,
            kind if kind in ("logits", "fused") else "chunked",  # others cannot be looked into
            placement.device.kind,
            batch.batch_size,
            data.max_seq_length,
            placement.precision,
            accumulates=batch.gradient_accumulation_steps > 1,
            compiled=compiled,
        )
    except Exception as error:  # whatever a model's own code makes of tensors without values
        if is_compiled:  # such layers may not compile either
            return plan_as(config, placement, mode, is_compiled=False)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"not planned: {type(model).__name__} does not run on tensors without values: {reason}"
        ) from error
    optimizer_bytes = count_state_bytes(model, config.optimizer.optimizer)
    parts["optimizer"] = optimizer_bytes
    if config.model.offload_activations and placement.device.kind == "cuda":
        # But for one that is being copied.
        parts["activations"] -= (layers - 1) * hidden_bytes
    if placement.num_processes > 1:
        parts = _share(parts, placement, all_bytes - 4 * count, count, largest_unit)
    micro_batches = batch.gradient_accumulation_steps * placement.num_processes
    lengths = np.full(batch.batch_size * micro_batches, data.max_seq_length)
    adapters = config.model.training_method != "full"
    return Plan(
        config=config,
        placement=placement,
        activations=mode,
        is_compiled=is_compiled,
        parts=parts,
        checkpoint_bytes=(4 * count if adapters else all_bytes) + optimizer_bytes,
        step_flops=None if flops is None else flops.of(lengths),
        forward_flops=None if flops is None else flops.linear.forward * int(lengths.sum()),
    )


def _share(
    parts: dict[str, int], placement: Placement, frozen_bytes: int, trained: int, largest_unit: int
) -> dict[str, int]:
    """Divides the state of training over the processes, as the engine does."""
    n, gathered = placement.num_processes, 2 * 2 * largest_unit
    if placement.engine == "ddp":  # which sends gradients from buckets of their own
        return {**parts, "gradients": parts["gradients"] + 4 * trained}
    if placement.engine == "fsdp2":
        own = {"parameters": (frozen_bytes + 4 * trained) // n, "gradients": 4 * trained // n}
        return {
            **parts,
            **own,
            "optimizer": parts["optimizer"] // n,
            "working": parts["working"] + gathered,
        }
    # DeepSpeed computes with bf16 weights, and keeps fp32 ones with the optimizer.
    fp32_bytes = 4 * trained
    weights = frozen_bytes + 2 * trained
    is_cut = placement.engine == "zero3"
    return {
        **parts,
        "parameters": weights // n if is_cut else weights,
        "gradients": 4 * trained // n,
        "optimizer": (parts["optimizer"] + fp32_bytes) // n,
        "working": parts["working"] + (gathered if is_cut else 0),
    }


def change_config(config: Config, changes: dict[str, Any]) -> Config:
    """Gives a config with other values; unlike a file's, they may contradict each other."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        sections.setdefault(KEYS[key].section, {})[key] = value
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=values)
            for section, values in sections.items()
        }
    )


def _set_attention(model: Any, config: Config, placement: Placement) -> None:
    """Has the model attend as it will; other kernels than ours take about as much."""
    wanted, device = config.model.attention, torch.device(placement.device.kind)
    if wanted == "eager":
        model.set_attn_implementation("eager")
    elif wanted != "sdpa" and why_not_documents(model, device, placement.precision) is None:
        model.set_attn_implementation(DOCUMENTS)


def _ends(model: Any) -> list[torch.nn.Module]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if isinstance(end, torch.nn.Module)]


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def name_parts(plan: Plan) -> str:
    """Names the parts of the peak: `parameters 20.2 MB, optimizer 40.4 MB, ...`."""
    return ", ".join(f"{name} {show_bytes(size)}" for name, size in plan.parts.items() if size)


def planned_steps(config: Config) -> int:
    """Returns the steps of the whole run, as far as the config alone tells."""
    return config.schedule.max_steps or 1000
