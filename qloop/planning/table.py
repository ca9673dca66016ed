"""`qloop plan`: the plans of all methods, one column each."""

import math

import torch

from qloop.config.keys import Config
from qloop.hardware import (
    find_device,
    measure_matmul_flops,
    peak_flops,
)
from qloop.planning.advice import show_change, suggest_changes
from qloop.planning.plan import Placement, Plan, change_config, make_plan, plan_as, planned_steps
from qloop.planning.simulation import PARTS
from qloop.storage.folders import show_bytes

METHODS = ("full", "lora", "qlora")


def show_plans(config: Config, placement: Placement, flops_use: float) -> str:
    """Says what a config needs, beside the other methods, and what would make it fit."""
    plans = [make_plan(config, placement)]
    for method in METHODS:
        if method != config.model.training_method:
            plans.append(make_plan(change_config(config, {"training_method": method}), placement))
    many = (
        f" x {placement.num_processes} by {placement.engine}" if placement.num_processes > 1 else ""
    )
    model = config.model.model_config_file or config.model.model_name
    batch = config.batch
    lines = [
        f"{model} on {placement.device.name}{many}, {show_bytes(placement.device.memory_bytes)}, "
        f"{placement.precision}; {batch.gradient_accumulation_steps} micro-batches of "
        f"{batch.batch_size} x {config.data.max_seq_length} tokens a step",
        "",
        format_plans(plans, find_flops(placement, flops_use)),
    ]
    if not plans[0].fits:
        changes = suggest_changes(plans[0])
        lines += ["", "it would fit with one of:" if changes else "no change would make it fit"]
        lines += [show_change(change, plan) for change, plan in changes]
    return "\n".join(lines)


def find_largest_batch(plan: Plan) -> int:
    """Finds the largest batch_size that fits, all else being the same; 0 if none does.

    Memory grows by the same with each block.
    """
    if not plan.fits and plan.config.batch.batch_size > 1:
        plan = plan_as(
            change_config(plan.config, {"batch_size": 1}), plan.placement, plan.activations
        )
    if not plan.fits:
        return 0
    size = plan.config.batch.batch_size
    more = plan_as(
        change_config(plan.config, {"batch_size": size + 1}), plan.placement, plan.activations
    )
    return size + plan.spare_bytes // max(1, more.peak_bytes - plan.peak_bytes)


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
            _show_seconds(estimate_seconds(plan, flops), planned_steps(plan.config))
            for plan in plans
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
        kept += planned_steps(plan.config) // settings.keep_every
    return plan.checkpoint_bytes * min(
        math.ceil(planned_steps(plan.config) / settings.save_steps), kept + 1
    )


def find_flops(placement: Placement, flops_use: float) -> float | None:
    """Finds the FLOP/s of training: a share of the data sheet's, or of a product measured here."""
    if placement.device == find_device():
        here = torch.device(placement.device.kind)
        dtype = torch.bfloat16 if placement.precision == "bf16" else torch.float32
        return measure_matmul_flops(here, dtype) * flops_use
    peak = peak_flops(placement.device.name)
    return None if peak is None else peak * flops_use


def estimate_seconds(plan: Plan, flops: float | None) -> float | None:
    """Estimates a step's time, from what is computed once and what is computed again."""
    if plan.step_flops is None or flops is None:
        return None
    again = plan.forward_flops if plan.activations == "full" else 0
    return (plan.step_flops + (again or 0)) / (flops * plan.placement.num_processes)


def _show_seconds(seconds: float | None, times: int = 1) -> str:
    if seconds is None:
        return "-"
    seconds *= times
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
