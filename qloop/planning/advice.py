"""Changes of the config that make a run fit, cheapest first."""

import dataclasses
import itertools
import operator
from typing import Any, NamedTuple

from qloop.errors import MemoryFullError
from qloop.planning.plan import CONTEXT_BYTES, Plan, change_config, make_plan
from qloop.storage.folders import show_bytes


class Suggestion(NamedTuple):
    """A change of the config with which a run fits."""

    change: dict[str, Any]
    """New values by key."""
    plan: Plan

    def __str__(self) -> str:
        """Returns the flags to type, with the planned peak memory."""
        flags = " ".join(f"--{key} {value}" for key, value in self.change.items())
        return f"  {flags}  ({show_bytes(self.plan.peak_bytes)})"


def suggest_changes(plan: Plan, limit: int = 3) -> list[Suggestion]:
    """Returns up to `limit` changes that make a run fit: single ones by cost, then combinations."""
    single = _list_changes(plan)
    combined = list(itertools.accumulate(single, operator.or_))
    found: list[Suggestion] = []
    for change in [*single, *combined[1:]]:
        changed = make_plan(change_config(plan.config, change), plan.placement)
        if changed.fits:
            found.append(Suggestion(change, changed))
        if len(found) == limit:
            break
    return found


def explain_out_of_memory(plan: Plan, step: int, measured_bytes: int) -> MemoryFullError:
    """Builds the error that names the parts of the peak and the changes that would fit.

    `step` is the one in progress, `measured_bytes` the peak so far.
    """
    device, context = plan.placement.device, CONTEXT_BYTES[plan.placement.device.kind]
    # The plan may say that the run fits, but it did not: a change must need less than planned.
    room = min(device.memory_bytes, plan.peak_bytes + context - 1)
    placement = dataclasses.replace(plan.placement, device=device._replace(memory_bytes=room))
    suggestions = suggest_changes(dataclasses.replace(plan, placement=placement))
    text = (
        f"step {step}: out of memory: {show_bytes(measured_bytes)} in use, "
        f"{show_bytes(plan.peak_bytes)} planned at the peak ({plan.describe_parts()}) of "
        f"{show_bytes(device.memory_bytes)}; "
    )
    if step > 1:
        text += "saved checkpoints are whole; "
    if not suggestions:
        return MemoryFullError(text + "use a smaller model")
    lines = [text + "one of these needs less:", *map(str, suggestions)]
    if step > 1 and any("batch_size" in suggestion.change for suggestion in suggestions):
        lines.append("to go on, add: --allow_change batch_size,gradient_accumulation_steps")
    return MemoryFullError("\n".join(lines))


def _list_changes(plan: Plan) -> list[dict[str, Any]]:
    """Lists changes that save memory by rising cost: none, time, then learning capacity."""
    config = plan.config
    length, batch = config.data.max_seq_length, config.batch
    changes: list[dict[str, Any]] = []
    if batch.batch_size > 1:
        more = batch.gradient_accumulation_steps * batch.batch_size
        changes.append({"batch_size": 1, "gradient_accumulation_steps": more})
    if plan.recomputation == "off" and plan.placement.engine != "zero3":
        changes.append({"gradient_checkpointing": "selective"})
    if plan.recomputation != "full":
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
