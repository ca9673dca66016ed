"""Puts the parts of a run together, in the order in which they can fail cheapest."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from transformers import PreTrainedTokenizerBase

from qloop.checkpoint.manager import Checkpoint, CheckpointManager, read_checkpoint
from qloop.config import Config, ModelConfig, find_changes
from qloop.data.packing import BlockIndex, pack_best_fit, pack_wrapped
from qloop.data.sources import find_sources
from qloop.data.tokens import TokenStore, load_corpus
from qloop.errors import ConfigError, DataError, join_names
from qloop.model.attention import check_isolation
from qloop.model.build import (
    build_encoder,
    build_model,
    check_sizes,
    choose_precision,
    count_parameters,
    fingerprint_weights,
    load_model_config,
    load_tokenizer,
)
from qloop.optimizer import build_optimizer
from qloop.progress import Progress
from qloop.report.ledger import describe_corpus, describe_ledger
from qloop.report.reporter import Reporter
from qloop.run_directory import RunDirectory, locate_run, write_json
from qloop.seeds import use_deterministic_kernels

_PACKINGS = {"best_fit": pack_best_fit, "wrapped": pack_wrapped}


@dataclass(frozen=True)
class HeldOut:
    """The documents never trained on, packed."""

    store: TokenStore
    index: BlockIndex


@dataclass(frozen=True)
class Assembly:
    """All that the loop works with."""

    config: Config
    run: RunDirectory
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    store: TokenStore
    index: BlockIndex
    held_out: HeldOut | None
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    checkpoints: CheckpointManager
    fingerprints: dict[str, str]
    report: Reporter
    last_step: int


def assemble(config: Config, notes: list[str]) -> Assembly:
    """Builds everything, from the run's folder to the reports; restores what a checkpoint holds.

    Args:
        config: The whole config.
        notes: Lines that the person should see at the start.

    Raises:
        QloopError: Something named by the config cannot be used; see the parts.
    """
    accelerator = build_accelerator(config)
    run = locate_run(config)
    checkpoints = CheckpointManager(
        run.checkpoints, config.checkpoint.keep_checkpoints, accelerator
    )
    checkpoint = choose_checkpoint(config, run, checkpoints)

    sources = find_sources(config.data)
    tokenizer = load_tokenizer(config.model)
    encoder = build_encoder(tokenizer)
    model_config = load_model_config(config.model)
    check_sizes(model_config, encoder.vocabulary_size, config.data.max_seq_length)
    with accelerator.main_process_first():
        corpus = load_corpus(
            *sources,
            encoder,
            config.data.cache_dir or config.run.output_dir / ".cache",
            config.data.held_out_share,
            config.data.train_on_prompt,
            config.data.deduplicate,
        )
    index = _PACKINGS[config.data.packing](corpus.train.positions, config.data.max_seq_length)
    held_out = None
    if corpus.held_out:
        positions = corpus.held_out.positions
        held_out = HeldOut(corpus.held_out, pack_best_fit(positions, config.data.max_seq_length))
    last_step = count_steps(config, len(index), accelerator.num_processes)

    precision = choose_precision(config.model.precision, accelerator.device)
    model = build_model(
        config.model,
        config.lora,
        precision,
        accelerator.device,
        config.run.seed,
        checkpoint.path if checkpoint else None,
    ).to(accelerator.device)
    isolation = check_isolation(model, encoder.vocabulary_size, precision)
    fingerprints = {
        "corpus": corpus.fingerprint,
        "tokenizer": encoder.fingerprint,
        "frozen_weights": fingerprint_weights(model),
    }
    if checkpoint:
        refuse_other_origins(checkpoint, fingerprints)

    held_out_index = held_out.index if held_out else None
    ledger = describe_corpus(corpus, index, held_out_index)
    if accelerator.is_main_process:
        run.create(config)
        write_json(run.data_report, ledger)
    accelerator.wait_for_everyone()
    optimizer = build_optimizer(model, config.optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = checkpoint.progress if checkpoint else Progress()
    if checkpoint:
        checkpoints.restore_optimizer(checkpoint, model, optimizer)

    report = Reporter(run, config, progress.step, last_step, accelerator.is_main_process)
    going_on = f"; going on from {checkpoint.path}" if checkpoint else ""
    opening_lines = [
        *notes,
        f"run        {run.path}",
        *describe_ledger(ledger, corpus.was_cached),
        describe_model(config.model, model, precision, accelerator),
        "isolation  packed documents do not see each other (logits move by "
        f"{isolation.swapped:.0e}, alone {isolation.alone:.0e})",
        f"steps      {progress.step} of {last_step} made{going_on}",
    ]
    report.say("\n".join(opening_lines))
    return Assembly(
        config, run, accelerator, tokenizer, corpus.train, index, held_out, model, optimizer,
        progress, checkpoints, fingerprints, report, last_step,
    )  # fmt: skip


def build_accelerator(config: Config) -> Accelerator:
    """Builds the accelerator for the machine it finds; one without a GPU may still have ranks.

    Raises:
        ConfigError: The launcher asks for an engine that shards the optimizer.
    """
    if config.run.deterministic:
        use_deterministic_kernels()
    cpu = not torch.accelerator.is_available()
    device = torch.device("cpu" if cpu else torch.accelerator.current_accelerator() or "cpu")
    precision = choose_precision(config.model.precision, device)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if precision == "bf16" else "no",
        # As a plugin: a plain number would yield to an environment variable of the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.batch.gradient_accumulation_steps, sync_with_dataloader=False
        ),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError(
            f"accelerate launch: {accelerator.distributed_type.value} shards the optimizer, which "
            "checkpoints cannot hold yet; launch without it (one process per GPU, each with the "
            "whole model), or use lora or qlora"
        )
    return accelerator


def describe_model(
    config: ModelConfig, model: torch.nn.Module, precision: str, accelerator: Accelerator
) -> str:
    """Says in the opening lines what is trained, and on what."""
    total, trained = count_parameters(model)
    return (
        f"model      {config.model_config_file or config.model_name}: {total:,} parameters, "
        f"{trained:,} trained ({config.training_method}, {precision}, "
        f"{accelerator.device.type} x {accelerator.num_processes})"
    )


def choose_checkpoint(
    config: Config, run: RunDirectory, checkpoints: CheckpointManager
) -> Checkpoint | None:
    """Finds what to go on from, and makes sure that it is this run's.

    Raises:
        ConfigError: The folder or the checkpoint belongs to another run, or going on would
            overwrite steps.
        CheckpointError: There is no such checkpoint.
    """
    resume = config.run.resume
    run.refuse_another(config)
    newest = checkpoints.newest()
    if resume == "never":
        return None
    path = newest if resume == "auto" else Path(resume)
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    changes = find_changes(Config.model_validate(checkpoint.config), config)
    if changes:
        raise ConfigError(
            f"{path}: was made with other settings:\n  " + "\n  ".join(changes) + "\n"
            "take its own values to go on with it"
        )
    if newest and read_checkpoint(newest).progress.step > checkpoint.progress.step:
        raise ConfigError(
            f"resume: {path} is older than {newest}, whose steps would be written anew; give "
            "another --experiment_name to branch off, or --resume auto to go on from the newest"
        )
    return checkpoint


def refuse_other_origins(checkpoint: Checkpoint, fingerprints: dict[str, str]) -> None:
    """Raises a ConfigError if the corpus, the tokenizer or the frozen base is another now."""
    other = [
        name.replace("_", " ")
        for name, value in fingerprints.items()
        if checkpoint.fingerprints.get(name) != value
    ]
    if other:
        raise ConfigError(
            f"{checkpoint.path}: the {join_names(other, 'and')} changed since it was saved, so "
            "going on would make another run of it; bring back what was there, or give another "
            "--experiment_name"
        )


def count_steps(config: Config, num_blocks: int, num_processes: int) -> int:
    """Says at which step the run ends: at max_steps or after num_epochs, whichever is first.

    The last step of an epoch may read on into the next, so that every block is read.

    Raises:
        DataError: The corpus is smaller than one step.
        ConfigError: The warm-up would not end before the run does.
    """
    batch, schedule = config.batch, config.schedule
    step_blocks = batch.batch_size * batch.gradient_accumulation_steps * num_processes
    if num_blocks < step_blocks:
        raise DataError(
            f"the corpus fills {num_blocks} blocks of {config.data.max_seq_length} tokens, but "
            "one step "
            f"reads {step_blocks} (batch_size {batch.batch_size} x gradient_accumulation_steps "
            f"{batch.gradient_accumulation_steps} x {num_processes} processes); lower one of "
            "them or max_seq_length, or give more documents"
        )
    limits = [schedule.max_steps] if schedule.max_steps else []
    if schedule.num_epochs:
        limits.append(math.ceil(schedule.num_epochs * num_blocks / step_blocks))
    last_step = min(limits, default=1000)
    if schedule.warmup_steps >= last_step:
        raise ConfigError(
            f"warmup_steps: must be below the run's {last_step} steps, got {schedule.warmup_steps}"
        )
    return last_step
