"""What would make a run fit: changes of the config, cheapest first."""

import dataclasses
from typing import Any

from qloop.errors import MemoryFullError
from qloop.planning.plan import CONTEXT_BYTES, Plan, change_config, make_plan, name_parts
from qloop.storage.folders import show_bytes


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
        changed = make_plan(change_config(plan.config, change), plan.placement)
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
    context = CONTEXT_BYTES[plan.placement.device.kind]
    room = min(plan.placement.device.memory_bytes, plan.peak_bytes + context - 1)
    device = plan.placement.device._replace(memory_bytes=room)
    smaller = dataclasses.replace(
        plan, placement=dataclasses.replace(plan.placement, device=device)
    )
    lines = [show_change(change, plan) for change, plan in suggest_changes(smaller)]
    # Other changes make another run.
    allowing = "to go on, beside them: --allow_change batch_size,gradient_accumulation_steps"
    return MemoryFullError(
        f"step {step}: out of memory: {show_bytes(measured_bytes)} were in use, "
        f"{show_bytes(plan.peak_bytes)} planned at the peak ({name_parts(plan)}) of "
        f"{show_bytes(plan.placement.device.memory_bytes)}; "
        + ("saved checkpoints are whole; " if step > 1 else "")
        + ("\n".join(["less is needed with one of:", *lines]) if lines else "use a smaller model")
        + (f"\n{allowing}" if step > 1 and "--batch_size" in "".join(lines) else "")
    )


def _list_changes(plan: Plan) -> list[dict[str, Any]]:
    """Lists what may save memory, by what it costs: time first, then what is learned."""
    config = plan.config
    length, batch = config.data.max_seq_length, config.batch
    changes: list[dict[str, Any]] = []
    if batch.batch_size > 1:  # costs nothing
        more = batch.gradient_accumulation_steps * batch.batch_size
        changes.append({"batch_size": 1, "gradient_accumulation_steps": more})
    if plan.activations == "off" and plan.placement.engine != "zero3":
        changes.append({"gradient_checkpointing": "selective"})
    if plan.activations != "full":
        changes.append({"gradient_checkpointing": "full"})
    if config.optimizer.optimizer == "adamw" and plan.placement.engine == "ddp":
        changes.append({"optimizer": "adamw_8bit"})
    if config.model.training_method == "full":
        changes.append({"training_method": "lora"})
    if config.model.training_method != "qlora":
        changes.append({"training_method": "qlora"})
    if length >= 1024:
        changes.append({"max_seq_length": length // 2})
    return changes


def show_change(change: dict[str, Any], plan: Plan) -> str:
    """Shows a change as the flags to type, with the peak memory that it leads to."""
    flags = " ".join(f"--{key} {value}" for key, value in change.items())
    return f"  {flags}  ({show_bytes(plan.peak_bytes)})"
