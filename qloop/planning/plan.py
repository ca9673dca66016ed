"""What a run will need, before it: memory, disk and time, from shapes alone.

Memory comes from `simulation.py`: a step of the real code on tensors without memory. What the
optimizer keeps lies there all the time, and is added. Several processes share the state of training
as `tests/benchmarks/arithmetic.py` has it; each has the activations of its own micro-batch.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from qloop.checkpoint.store import show_bytes
from qloop.config.keys import KEYS, Config
from qloop.errors import ConfigError, MemoryFullError, PlanError, join_names
from qloop.model.activations import find_layers, keep_activations
from qloop.model.attention import DOCUMENTS, why_not_documents
from qloop.model.build import choose_precision
from qloop.model.compilation import is_worthwhile
from qloop.model.flops import build_model_flops, measure_matmul_flops, peak_flops
from qloop.model.loss import choose_kind
from qloop.optimizer import count_state_bytes
from qloop.planning.meta_model import build_shapes
from qloop.planning.simulation import PARTS, simulate_step

CONTEXT_BYTES = {"cuda": 1_000_000_000, "cpu": 700_000_000}
"""Beside the tensors, about, and not measured: CUDA's context and kernels; Python's libraries."""

HEAD_ROOM = 0.1
"""Share of the memory that `auto` leaves free, for what an allocator wastes."""

DEVICES = {
    "h200": ("NVIDIA H200", 141e9),
    "b200": ("NVIDIA B200", 180e9),
    "h100": ("NVIDIA H100 80GB HBM3", 80e9),
    "a100-80": ("NVIDIA A100-SXM4-80GB", 80e9),
    "a100-40": ("NVIDIA A100-SXM4-40GB", 40e9),
    "l40s": ("NVIDIA L40S", 48e9),
    "l4": ("NVIDIA L4", 24e9),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 24e9),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 24e9),
}
"""Names as torch has them, and bytes as sold."""

METHODS = ("full", "lora", "qlora")
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


class Device(NamedTuple):
    """Where a run is to go."""

    name: str
    kind: str
    """`cuda` or `cpu`."""
    memory_bytes: int


@dataclass(frozen=True)
class Target:
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
    """What a run of a config needs on each device of a target."""

    config: Config
    target: Target
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
        device = self.target.device
        return device.memory_bytes - self.peak_bytes - CONTEXT_BYTES[device.kind]

    @property
    def fits(self) -> bool:
        """Whether the device has room for it all."""
        return self.spare_bytes >= 0


def find_device() -> Device:
    """Describes the device that a run here would use."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, "cuda", int(properties.total_memory))
    return Device("CPU", "cpu", int(psutil.virtual_memory().total))


def find_target(
    config: Config, name: str | None, memory_gb: float | None, num_processes: int, engine: str
) -> Target:
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
    return Target(device, precision, engine, num_processes)


def show_plans(config: Config, target: Target, flops_use: float) -> str:
    """Says what a config needs, beside the other methods, and what would make it fit."""
    plans = [make_plan(config, target)]
    for method in METHODS:
        if method != config.model.training_method:
            plans.append(make_plan(_change(config, {"training_method": method}), target))
    many = f" x {target.num_processes} by {target.engine}" if target.num_processes > 1 else ""
    model = config.model.model_config_file or config.model.model_name
    batch = config.batch
    lines = [
        f"{model} on {target.device.name}{many}, {show_bytes(target.device.memory_bytes)}, "
        f"{target.precision}; {batch.gradient_accumulation_steps} micro-batches of "
        f"{batch.batch_size} x {config.data.max_seq_length} tokens a step",
        "",
        format_plans(plans, find_flops(target, flops_use)),
    ]
    if not plans[0].fits:
        changes = suggest_changes(plans[0])
        lines += ["", "it would fit with one of:" if changes else "no change would make it fit"]
        lines += [_show_change(change, plan) for change, plan in changes]
    return "\n".join(lines)


def make_plan(config: Config, target: Target) -> Plan:
    """Plans a run; `auto` in gradient_checkpointing takes what is fastest and fits.

    Raises:
        ConfigError: The model cannot be found or built.
        PlanError: It cannot be simulated.
    """
    wanted = str(config.model.gradient_checkpointing)
    if wanted != "auto":
        return _plan(config, target, wanted)
    modes = ["full"] if config.model.offload_activations else ["off", "selective", "full"]
    if target.engine == "zero3" and "selective" in modes:
        modes.remove("selective")
    for mode in modes:
        plan = _plan(config, target, mode)
        if plan.spare_bytes >= HEAD_ROOM * target.device.memory_bytes:
            break
    return plan


def plan_run(config: Config, target: Target) -> tuple[Plan | None, str]:
    """Plans a run that begins, and describes it in a line for its opening.

    No plan is no reason not to train: a model whose code asks tensors for values, say, cannot be
    simulated, and trains all the same.
    """
    try:
        plan = make_plan(config, target)
    except PlanError as error:
        return None, f"memory     {error}"
    room = "" if plan.fits else "; it may not fit: see qloop plan"
    return plan, (
        f"memory     {show_bytes(plan.peak_bytes)} planned at the peak, of "
        f"{show_bytes(target.device.memory_bytes)} ({_name_parts(plan)}){room}"
    )


def find_largest_batch(plan: Plan) -> int:
    """Finds the largest batch_size that fits, all else being the same; 0 if none does.

    Memory grows by the same with each block.
    """
    if not plan.fits and plan.config.batch.batch_size > 1:
        plan = _plan(_change(plan.config, {"batch_size": 1}), plan.target, plan.activations)
    if not plan.fits:
        return 0
    size = plan.config.batch.batch_size
    more = _plan(_change(plan.config, {"batch_size": size + 1}), plan.target, plan.activations)
    return size + plan.spare_bytes // max(1, more.peak_bytes - plan.peak_bytes)


def suggest_changes(plan: Plan, limit: int = 3) -> list[tuple[dict[str, Any], Plan]]:
    """Finds changes that make a run fit, those that cost least first; then all up to one of them.

    Returns:
        The keys with their new values, and the plan with them.
    """
    found: list[tuple[dict[str, Any], Plan]] = []
    together: dict[str, Any] = {}
    changes = _list_changes(plan)
    cumulated = []
    for change in changes:
        together = {**together, **change}
        cumulated.append(together)
    for change in [*changes, *cumulated]:
        if change in [seen for seen, _ in found]:
            continue
        changed = make_plan(_change(plan.config, change), plan.target)
        if changed.fits:
            found.append((change, changed))
        if len(found) == limit:
            break
    return found


def explain_out_of_memory(plan: Plan, step: int, measured_bytes: int) -> MemoryFullError:
    """Builds the error that says where the memory went and what would fit.

    Args:
        plan: Of the run.
        step: That was being made.
        measured_bytes: In use at most.
    """
    # What did not fit in fact is not to fit in the plan either.
    context = CONTEXT_BYTES[plan.target.device.kind]
    room = min(plan.target.device.memory_bytes, plan.peak_bytes + context - 1)
    device = plan.target.device._replace(memory_bytes=room)
    smaller = dataclasses.replace(plan, target=dataclasses.replace(plan.target, device=device))
    lines = [_show_change(change, plan) for change, plan in suggest_changes(smaller)]
    # Other changes make another run.
    allowing = "to go on, beside them: --allow_change batch_size,gradient_accumulation_steps"
    return MemoryFullError(
        f"step {step}: out of memory: {show_bytes(measured_bytes)} were in use, "
        f"{show_bytes(plan.peak_bytes)} planned at the peak ({_name_parts(plan)}) of "
        f"{show_bytes(plan.target.device.memory_bytes)}; "
        + ("saved checkpoints are whole; " if step > 1 else "")
        + ("\n".join(["less is needed with one of:", *lines]) if lines else "use a smaller model")
        + (f"\n{allowing}" if step > 1 and "--batch_size" in "".join(lines) else "")
    )


def format_plans(plans: list[Plan], flops: float | None) -> str:
    """Lays plans out side by side.

    Args:
        plans: The config's own first, which is marked.
        flops: FLOP/s that a device reaches in training; None leaves times out.
    """
    own = plans[0]
    plans = sorted(plans, key=lambda plan: METHODS.index(plan.config.model.training_method))

    def name(plan: Plan) -> str:
        return f"{plan.config.model.training_method}{' *' if plan is own else ''}"

    def fit(plan: Plan) -> str:
        spare = show_bytes(abs(plan.spare_bytes))
        return f"{spare} free" if plan.fits else f"no, {spare} short"

    rows: dict[str, list[str]] = {
        "": [name(plan) for plan in plans],
        **{part: [show_bytes(plan.parts[part]) for plan in plans] for part in PARTS},
        "peak": [show_bytes(plan.peak_bytes) for plan in plans],
        "fits": [fit(plan) for plan in plans],
        "computed again": [plan.activations for plan in plans],
        "compiled": ["layers" if plan.is_compiled else "nothing" for plan in plans],
        "largest batch_size": [str(find_largest_batch(plan)) for plan in plans],
        "a checkpoint": [show_bytes(plan.checkpoint_bytes) for plan in plans],
        "disk for the run": [show_bytes(count_disk_bytes(plan)) for plan in plans],
        "a step": [_show_seconds(estimate_seconds(plan, flops)) for plan in plans],
        "the run": [
            _show_seconds(estimate_seconds(plan, flops), _steps(plan.config)) for plan in plans
        ],
    }
    return "\n".join(
        f"{title:<20}" + "".join(f"{cell:>18}" for cell in row) for title, row in rows.items()
    )


def count_disk_bytes(plan: Plan) -> int:
    """Counts what the checkpoints of a run take: those that are kept, and one that is written."""
    settings = plan.config.checkpoint
    kept = settings.keep_checkpoints + int(settings.keep_best)
    if settings.keep_every:
        kept += _steps(plan.config) // settings.keep_every
    return plan.checkpoint_bytes * min(
        math.ceil(_steps(plan.config) / settings.save_steps), kept + 1
    )


def find_flops(target: Target, flops_use: float) -> float | None:
    """Finds the FLOP/s of training: a share of the data sheet's, or of a product measured here."""
    if target.device == find_device():
        here = torch.device(target.device.kind)
        dtype = torch.bfloat16 if target.precision == "bf16" else torch.float32
        return measure_matmul_flops(here, dtype) * flops_use
    peak = peak_flops(target.device.name)
    return None if peak is None else peak * flops_use


def estimate_seconds(plan: Plan, flops: float | None) -> float | None:
    """Estimates a step's time, from what is computed once and what is computed again."""
    if plan.step_flops is None or flops is None:
        return None
    again = plan.forward_flops if plan.activations == "full" else 0
    return (plan.step_flops + (again or 0)) / (flops * plan.target.num_processes)


def _is_compiled(config: Config, target: Target) -> bool:
    if target.engine in ("zero2", "zero3"):
        return False
    micro_batches = target.micro_batches
    if micro_batches is None:
        micro_batches = _steps(config) * config.batch.gradient_accumulation_steps
    return is_worthwhile(config.model, target.device.kind, micro_batches)


def _plan(config: Config, target: Target, mode: str, is_compiled: bool | None = None) -> Plan:
    if is_compiled is None:
        is_compiled = _is_compiled(config, target)
    data, batch = config.data, config.batch
    model = build_shapes(config.model, config.lora, target.precision)
    flops = build_model_flops(model)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    count = sum(map(math.prod, trained.values()))
    all_bytes = sum(parameter.nbytes for parameter in model.parameters())
    shares_weights = target.engine in ("fsdp2", "zero2", "zero3")
    if shares_weights and target.precision == "bf16":
        model = model.to(torch.bfloat16)  # what layers are given; the masters lie elsewhere
    largest_unit = max(map(_count_parameters, [*find_layers(model), *_ends(model)]), default=0)
    layers, rows = len(find_layers(model)), batch.batch_size * data.max_seq_length
    is_compiled = is_compiled and layers > 0
    _set_attention(model, config, target)
    # A layer that is computed again as a whole keeps the same, compiled or not.
    compiled = mode if is_compiled and mode != "full" else None
    if compiled is None:
        keep_activations(model, mode)
    vocabulary_size = model.config.get_text_config().vocab_size
    kind = choose_kind(
        config.model.loss, target.device.kind, rows * vocabulary_size * 4,
        may_compile=config.model.compile is not False,
    )  # fmt: skip
    hidden_bytes = model.get_input_embeddings().weight.element_size()
    hidden_bytes *= rows * model.config.get_text_config().hidden_size
    try:
        parts = simulate_step(
            model,
            kind if kind in ("logits", "fused") else "chunked",  # others cannot be looked into
            target.device.kind,
            batch.batch_size,
            data.max_seq_length,
            target.precision,
            accumulates=batch.gradient_accumulation_steps > 1,
            compiled=compiled,
        )
    except Exception as error:  # whatever a model's own code makes of tensors without values
        if is_compiled:  # such layers may not compile either
            return _plan(config, target, mode, is_compiled=False)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"not planned: {type(model).__name__} does not run on tensors without values: {reason}"
        ) from error
    optimizer_bytes = count_state_bytes(model, config.optimizer.optimizer)
    parts["optimizer"] = optimizer_bytes
    if config.model.offload_activations and target.device.kind == "cuda":
        # But for one that is being copied.
        parts["activations"] -= (layers - 1) * hidden_bytes
    if target.num_processes > 1:
        parts = _share(parts, target, all_bytes - 4 * count, count, largest_unit)
    micro_batches = batch.gradient_accumulation_steps * target.num_processes
    lengths = np.full(batch.batch_size * micro_batches, data.max_seq_length)
    adapters = config.model.training_method != "full"
    return Plan(
        config=config,
        target=target,
        activations=mode,
        is_compiled=is_compiled,
        parts=parts,
        checkpoint_bytes=(4 * count if adapters else all_bytes) + optimizer_bytes,
        step_flops=None if flops is None else flops.of(lengths),
        forward_flops=None if flops is None else flops.linear.forward * int(lengths.sum()),
    )


def _share(
    parts: dict[str, int], target: Target, frozen_bytes: int, trained: int, largest_unit: int
) -> dict[str, int]:
    """Divides the state of training over the processes, as the engine does."""
    n, gathered = target.num_processes, 2 * 2 * largest_unit
    if target.engine == "ddp":  # which sends gradients from buckets of their own
        return {**parts, "gradients": parts["gradients"] + 4 * trained}
    if target.engine == "fsdp2":
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
    is_cut = target.engine == "zero3"
    return {
        **parts,
        "parameters": weights // n if is_cut else weights,
        "gradients": 4 * trained // n,
        "optimizer": (parts["optimizer"] + fp32_bytes) // n,
        "working": parts["working"] + (gathered if is_cut else 0),
    }


def _list_changes(plan: Plan) -> list[dict[str, Any]]:
    """Lists what may save memory, by what it costs: time first, then what is learned."""
    config = plan.config
    length, batch = config.data.max_seq_length, config.batch
    changes: list[dict[str, Any]] = []
    if batch.batch_size > 1:  # costs nothing
        more = batch.gradient_accumulation_steps * batch.batch_size
        changes.append({"batch_size": 1, "gradient_accumulation_steps": more})
    if plan.activations == "off" and plan.target.engine != "zero3":
        changes.append({"gradient_checkpointing": "selective"})
    if plan.activations != "full":
        changes.append({"gradient_checkpointing": "full"})
    if config.optimizer.optimizer == "adamw" and plan.target.engine == "ddp":
        changes.append({"optimizer": "adamw_8bit"})
    if config.model.training_method == "full":
        changes.append({"training_method": "lora"})
    if config.model.training_method != "qlora":
        changes.append({"training_method": "qlora"})
    if length >= 1024:
        changes.append({"max_seq_length": length // 2})
    return changes


def _change(config: Config, changes: dict[str, Any]) -> Config:
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


def _set_attention(model: Any, config: Config, target: Target) -> None:
    """Has the model attend as it will; other kernels than ours take about as much."""
    wanted, device = config.model.attention, torch.device(target.device.kind)
    if wanted == "eager":
        model.set_attn_implementation("eager")
    elif wanted != "sdpa" and why_not_documents(model, device, target.precision) is None:
        model.set_attn_implementation(DOCUMENTS)


def _ends(model: Any) -> list[torch.nn.Module]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if isinstance(end, torch.nn.Module)]


def _count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _show_change(change: dict[str, Any], plan: Plan) -> str:
    flags = " ".join(f"--{key} {value}" for key, value in change.items())
    return f"  {flags}  ({show_bytes(plan.peak_bytes)})"


def _name_parts(plan: Plan) -> str:
    return ", ".join(f"{name} {show_bytes(size)}" for name, size in plan.parts.items() if size)


def _steps(config: Config) -> int:
    return config.schedule.max_steps or 1000


def _show_seconds(seconds: float | None, times: int = 1) -> str:
    if seconds is None:
        return "-"
    seconds *= times
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
