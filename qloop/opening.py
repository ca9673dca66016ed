"""The lines that a run opens with, and the commands that it ends with, from the finished `Run`."""

import shlex
from pathlib import Path
from typing import Any

from qloop.config.keys import KEYS, BatchConfig, Config, DataConfig, as_flag
from qloop.config.loading import iterate_unused
from qloop.run import Run
from qloop.storage.folders import show_bytes

_ENGINE_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def describe_run(run: Run) -> list[str]:
    """Returns the lines, each with a title of ten columns."""
    optimizer = run.engine.optimizer
    lines = [*run.notes, *run.folder.messages, run.prepared.restored]
    lines += [f"run        {run.folder.directory.path}"]
    lines += describe_ledger(run.data.describe(), run.data.corpus.was_cached)
    lines += [describe_model(run)]
    rate = run.meter.matmul_flops / 1e12
    lines += [f"product    {rate:.3g} TFLOP/s in {run.built.placement.precision}, 100% of MFU"]
    if len(optimizer.each) > 1:
        lines += [f"optimizer  {optimizer.describe()}"]
    attention, isolation = run.prepared.attention, run.prepared.isolation
    lines += [
        f"attention  {attention.name}{f', as {attention.reason}' * bool(attention.reason)}; packed "
        f"documents do not see each other (logits move by {isolation.swapped:.0e}, alone "
        f"{isolation.alone:.0e})"
    ]
    reason = f" ({run.target_loss.reason})" * bool(run.target_loss.reason)
    lines += [
        f"loss       {run.target_loss.kind}{reason}; gradient checkpointing "
        f"{run.built.recomputation}"
    ]
    if run.prepared.compilation:
        lines += [f"compiled   {run.prepared.compilation}"]
    lines += [describe_plan(run), describe_progress(run)]
    if run.layout.accumulation != run.config.batch.gradient_accumulation_steps:
        lines += [
            f"step       reads {run.layout.blocks} blocks, as from the start of this run: "
            f"gradient_accumulation_steps is {run.layout.accumulation} on every process, not "
            f"{run.config.batch.gradient_accumulation_steps}"
        ]
    lines += run.checkpoints.describe_space(run.engine, run.progress.step, run.last_step)
    return [line for line in lines if line]


def describe_ledger(ledger: dict[str, Any], was_cached: bool) -> list[str]:
    """Returns the counts of both sides of the corpus, and what was left out."""
    lines = []
    for side in ("train", "held_out"):
        counts = ledger[side]
        if not counts or not counts["documents"]:
            continue
        lines.append(
            f"{side.replace('_', ' '):10} {counts['documents']:,} documents, "
            f"{counts['bytes']:,} bytes, {counts['tokens']:,} tokens, {counts['targets']:,} "
            f"targets, {counts['blocks']:,} blocks, {counts['padding_share']:.2%} padding"
        )
        left_out = [
            f"{counts[name]:,} {name.replace('_', ' ')}"
            for name in ("refused", "duplicates", "also_held_out")
            if counts[name]
        ]
        if left_out:
            lines.append(f"           left out: {', '.join(left_out)}; see data_report.json")
    how = "opened from the cache" if was_cached else "tokenised now"
    return [*lines, f"           {how}; fingerprint {ledger['fingerprint'][:12]}"]


def describe_model(run: Run) -> str:
    """Returns the name and size of the model, and where it is trained."""
    settings, accelerator = run.config.model, run.accelerator
    name = run.built.placement.engine
    is_alone = name == "ddp" and accelerator.num_processes == 1
    engine = "" if is_alone else f", {_ENGINE_NAMES[name]}"
    return (
        f"model      {settings.model_config_file or settings.model_name}: "
        f"{run.built.num_parameters:,} parameters, {run.built.num_trained:,} trained "
        f"({settings.training_method}, {run.built.placement.precision}, "
        f"{accelerator.device.type} x {accelerator.num_processes}{engine})"
    )


def describe_plan(run: Run) -> str:
    """Returns the planned memory, or why there is no plan."""
    plan = run.built.plan
    if isinstance(plan, str):
        return f"memory     {plan}"
    return (
        f"memory     {show_bytes(plan.peak_bytes)} planned at the peak, of "
        f"{show_bytes(plan.placement.device.memory_bytes)} ({plan.describe_parts()})"
        + ("" if plan.fits else "; it may not fit: see qloop plan")
    )


def describe_progress(run: Run) -> str:
    """Returns how far the run is, and the checkpoint that it goes on from."""
    checkpoint = run.folder.checkpoint
    going_on = f"; going on from {checkpoint.path}" if checkpoint else ""
    return f"steps      {run.progress.step} of {run.last_step} made{going_on}"


def describe_next(run: Run, checkpoint: Path) -> list[str]:
    """Returns what to type after a run: commands that work as they are."""
    config, folder = run.config, run.folder.directory
    longer: dict[str, Any] = {}
    if config.schedule.num_epochs:
        longer["num_epochs"] = 2 * config.schedule.num_epochs
    if config.schedule.max_steps or not longer:
        longer["max_steps"] = 2 * run.progress.step
    if config.run.resume != "auto":  # the file says how this run was started
        longer["resume"] = "auto"
    lines = [f"  train on   {_command({'config': folder.config, **longer})}"]
    if config.model.training_method != "full":
        base = f"AutoModelForCausalLM.from_pretrained({config.model.model_name!r})"
        return [*lines, f"  load it    PeftModel.from_pretrained({base}, '{checkpoint}')"]
    adapt = {
        "model_name": checkpoint,
        "training_method": "lora",
        "experiment_name": f"{folder.path.name[:59]}-lora",
        **_find_given(config, *DataConfig.model_fields, *BatchConfig.model_fields),
        **_find_given(config, "max_steps", "num_epochs", "warmup_steps"),
        **_find_given(config, "trust_remote_code", "output_dir"),
    }
    lines.append(f"  adapt it   {_command(adapt)}")
    return [*lines, f"  load it    AutoModelForCausalLM.from_pretrained('{checkpoint}')"]


def _find_given(config: Config, *names: str) -> dict[str, Any]:
    """Returns the values that are not the defaults, of those keys that have an effect."""
    unused = {name for names, _ in iterate_unused(config) for name in names} | {"cache_dir"}
    given = {}
    for name in names:
        section = KEYS[name].section
        value, default = (getattr(getattr(c, section), name) for c in (config, Config()))
        if value != default and name not in unused:
            given[name] = value
    return given


def _command(flags: dict[str, Any]) -> str:
    words = [f"--{key} {shlex.quote(as_flag(value))}" for key, value in flags.items()]
    return " ".join(["qloop train", *words])
