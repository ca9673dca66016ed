"""`qloop plan`: the plans of the three methods, one column each."""

import math
from collections.abc import Callable

import torch

from qloop.config.keys import Config
from qloop.hardware import find_device, measure_matmul_flops, peak_flops
from qloop.planning.advice import suggest_changes
from qloop.planning.plan import Placement, Plan, change_config, make_plan, plan_with
from qloop.planning.simulation import PARTS
from qloop.storage.folders import show_bytes

METHODS = ("full", "lora", "qlora")


def show_plans(config: Config, placement: Placement, flops_use: float) -> str:
    """Returns the plans of all methods; if the config's does not fit, also changes that would."""
    own = make_plan(config, placement)
    plans = [
        own
        if method == config.model.training_method
        else make_plan(change_config(config, {"training_method": method}), placement)
        for method in METHODS
    ]
    device, batch = placement.device, config.batch
    many = placement.num_processes > 1
    lines = [
        f"{config.model.model_config_file or config.model.model_name} on {device.name}"
        f"{f' x {placement.num_processes} with {placement.engine}' if many else ''}, "
        f"{show_bytes(device.memory_bytes)}, {placement.precision}; "
        f"{batch.gradient_accumulation_steps} micro-batches of {batch.batch_size} x "
        f"{config.data.max_seq_length} tokens per step",
        "",
        format_plans(plans, own, find_flops(placement, flops_use)),
    ]
    if not own.fits:
        changes = suggest_changes(own)
        lines += ["", "it would fit with one of:" if changes else "no change would make it fit"]
        lines += map(str, changes)
    return "\n".join(lines)


def format_plans(plans: list[Plan], own: Plan, flops: float | None) -> str:
    """Lays plans out in columns; marks `own`, the config's, with a star.

    `flops` are the FLOP/s that a device reaches in training; None leaves times out.
    """

    def fit(plan: Plan) -> str:
        spare = show_bytes(abs(plan.spare_bytes))
        return f"{spare} free" if plan.fits else f"no, {spare} short"

    def size(part: str) -> Callable[[Plan], str]:
        return lambda plan: show_bytes(plan.parts[part])

    cells: dict[str, Callable[[Plan], str]] = {
        "": lambda plan: f"{plan.config.model.training_method}{' *' if plan is own else ''}",
        **{part: size(part) for part in PARTS},
        "peak": lambda plan: show_bytes(plan.peak_bytes),
        "fits": fit,
        "recomputed": lambda plan: plan.recomputation,
        "compiled": lambda plan: "layers" if plan.kernels.compiles else "nothing",
        "largest batch_size": lambda plan: str(find_largest_batch(plan)),
        "a checkpoint": lambda plan: show_bytes(plan.checkpoint_bytes),
        "disk for the run": lambda plan: show_bytes(count_disk_bytes(plan)),
        "a step": lambda plan: _show_seconds(estimate_seconds(plan, flops)),
        "the run": lambda plan: _show_seconds(estimate_seconds(plan, flops), plan.steps),
    }
    return "\n".join(
        f"{title:<20}" + "".join(f"{cell(plan):>18}" for plan in plans)
        for title, cell in cells.items()
    )


def find_largest_batch(plan: Plan) -> int:
    """Returns the largest batch_size that fits with all else equal; 0 if none does.

    Every block adds the same amount of memory.
    """

    def with_batch_size(size: int) -> Plan:
        config = change_config(plan.config, {"batch_size": size})
        return plan_with(config, plan.placement, plan.recomputation)

    size = plan.config.batch.batch_size
    if not plan.fits and size > 1:
        plan, size = with_batch_size(1), 1
    if not plan.fits:
        return 0
    more = with_batch_size(size + 1)
    return size + plan.spare_bytes // max(1, more.peak_bytes - plan.peak_bytes)


def count_disk_bytes(plan: Plan) -> int:
    """Returns the bytes of the run's checkpoints: all those kept and the one being written."""
    settings = plan.config.checkpoint
    kept = settings.keep_checkpoints + int(settings.keep_best)
    if settings.keep_every:
        kept += plan.steps // settings.keep_every
    return plan.checkpoint_bytes * min(math.ceil(plan.steps / settings.save_steps), kept + 1)


def find_flops(placement: Placement, flops_use: float) -> float | None:
    """Returns the FLOP/s of training: `flops_use` times those of a matrix product.

    They are measured for this machine's device; others have those of the data sheet, or None.
    """
    if placement.device == find_device():
        here = torch.device(placement.device.kind)
        dtype = torch.bfloat16 if placement.precision == "bf16" else torch.float32
        return measure_matmul_flops(here, dtype) * flops_use
    peak = peak_flops(placement.device.name)
    return None if peak is None else peak * flops_use


def estimate_seconds(plan: Plan, flops: float | None) -> float | None:
    """Returns the seconds of a step, a recomputed forward pass included; None if unknown."""
    if plan.step_flops is None or flops is None:
        return None
    recomputed = (plan.forward_flops or 0) if plan.recomputation == "full" else 0
    return (plan.step_flops + recomputed) / (flops * plan.placement.num_processes)


def _show_seconds(seconds: float | None, times: int = 1) -> str:
    if seconds is None:
        return "-"
    seconds *= times
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
