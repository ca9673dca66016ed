"""Puts the parts of a run together, in the order in which they can fail cheapest."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PreTrainedTokenizerBase

from qloop.checkpoint.manager import CheckpointManager
from qloop.checkpoint.resume import (
    Checkpoint,
    Provenance,
    choose_checkpoint,
    refuse_other_provenance,
    restore,
)
from qloop.checkpoint.store import CheckpointStore
from qloop.config.keys import Config, ModelConfig
from qloop.data.batches import StepReader
from qloop.data.corpus import Corpus, build_corpus, open_corpus
from qloop.data.documents import Source
from qloop.data.encoder import Encoder, build_encoder
from qloop.data.indexes import load_index
from qloop.data.packing import BlockIndex
from qloop.data.sources import find_sources
from qloop.data.tokens import TokenStore
from qloop.distributed.accelerator import (
    build_accelerator,
    build_engine,
    describe_engine,
    reads_weights,
)
from qloop.distributed.engine import Engine
from qloop.distributed.peers import PeerWatch
from qloop.distributed.ranks import on_all, on_main
from qloop.errors import QloopError, explaining_disk_errors
from qloop.hardware import choose_precision, find_device, measure_matmul_flops, measure_memory
from qloop.model.activations import set_recomputation
from qloop.model.build import build_model
from qloop.model.flops import build_model_flops
from qloop.model.isolation import choose_attention
from qloop.model.loss import TargetLoss, choose_loss
from qloop.model.pretrained import check_sizes, load_model_config, load_tokenizer
from qloop.model.state import collect_files, count_parameters, fingerprint_weights
from qloop.planning.plan import Placement, Plan, plan_run
from qloop.report.metrics import Meter
from qloop.report.opening import describe_corpus, describe_ledger
from qloop.report.reporter import Reporter
from qloop.run_directory import RunDirectory, RunLock, locate_run
from qloop.steps import Progress, StepLayout, count_steps, divide_step
from qloop.storage.filesystem import FileSystem
from qloop.storage.folders import write_json
from qloop.warmup import compile_and_warm_up, compiles


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
    lock: RunLock
    accelerator: Accelerator
    peers: PeerWatch
    tokenizer: PreTrainedTokenizerBase
    index: BlockIndex
    reader: StepReader
    held_out: HeldOut | None
    model: torch.nn.Module
    """As prepared: to be called, and in the loop only."""
    loss: TargetLoss
    engine: Engine
    step: StepLayout
    progress: Progress
    checkpoints: CheckpointManager
    report: Reporter
    meter: Meter
    plan: Plan | None
    """What was planned for it; None for a model that cannot be simulated."""
    last_step: int

    def close(self) -> None:
        """Ends the reports, and lets others use the run's folder."""
        self.peers.stop()
        self.reader.close()
        self.report.close()
        self.lock.release()


def assemble(config: Config, notes: list[str]) -> Assembly:
    """Builds everything, from the run's folder to the reports; restores what a checkpoint holds.

    Args:
        config: The whole config.
        notes: Lines that the person should see at the start.

    Raises:
        QloopError: Something named by the config cannot be used; see the parts. The run's folder is
            free again.
    """
    accelerator = build_accelerator(config)
    peers = PeerWatch(accelerator)
    run = locate_run(config)
    lock = RunLock(run.path)
    try:
        on_main(accelerator, lock.acquire)
        return _assemble(config, run, lock, accelerator, peers, list(notes))
    except BaseException as error:
        lock.release()
        explained = peers.explain(error)
        peers.stop()
        if explained is error:
            raise
        raise explained from error


def _assemble(
    config: Config,
    run: RunDirectory,
    lock: RunLock,
    accelerator: Accelerator,
    peers: PeerWatch,
    notes: list[str],
) -> Assembly:
    store = CheckpointStore(run.checkpoints, FileSystem(), lock.check)

    checkpoint = on_main(accelerator, lambda: _choose(config, run, store, notes))
    progress = checkpoint.progress if checkpoint else Progress()
    keeps_step = checkpoint and "step_blocks" not in config.run.allow_change
    step = divide_step(
        config.batch,
        accelerator.num_processes,
        checkpoint.provenance.step_blocks if checkpoint and keeps_step else None,
        checkpoint.path if checkpoint else None,
    )

    sources: list[Source | None] = []  # on the main rank, which alone reads the corpus
    on_main(accelerator, lambda: sources.extend(find_sources(config.data)))
    tokenizer = load_tokenizer(config.model)
    encoder = build_encoder(tokenizer)
    model_config = load_model_config(config.model)
    check_sizes(model_config, encoder.vocabulary_size, config.data.max_seq_length)
    corpus, index, held_out = _load_data(config, sources, encoder, accelerator)
    last_step = count_steps(
        config.schedule, config.batch, config.data.max_seq_length, len(index), step.blocks, progress
    )

    precision = choose_precision(config.model.precision, accelerator.device)
    memory_before = measure_memory(accelerator.device).now
    build = functools.partial(
        build_model,
        config.model,
        config.lora,
        precision,
        accelerator.device,
        config.run.seed,
        checkpoint.path if checkpoint else None,
        is_sharded=accelerator.distributed_type == DistributedType.FSDP,
        reads_weights=reads_weights(accelerator),
    )
    model = on_all(accelerator, build)
    meter = build_meter(index, model, precision, memory_before, accelerator)
    micro_batches = last_step * step.accumulation
    placement = describe_placement(accelerator, precision, micro_batches)
    plan, plan_line = plan_run(config, placement)
    activations = choose_activations(config, accelerator, plan)
    set_recomputation(model, activations, config.model.offload_activations)
    model_line = describe_model(config.model, model, precision, accelerator)
    fingerprints = {
        "corpus": corpus.fingerprint,
        "tokenizer": encoder.fingerprint,
        # Under FSDP2 only the main rank has read the weights.
        "frozen_weights": on_main(accelerator, lambda: fingerprint_weights(model)),
    }
    provenance = Provenance(config.model_dump(mode="json"), fingerprints, step.blocks)
    if checkpoint:
        refuse_other_provenance(checkpoint, provenance, config.run.allow_change)

    ledger = describe_corpus(corpus, index, held_out.index if held_out else None)

    def write_folder() -> None:
        with explaining_disk_errors(run.path):
            run.create(config)
            write_json(run.data_report, ledger)

    on_main(accelerator, write_folder)
    files = collect_files(model, tokenizer)
    engine = build_engine(accelerator, model, config, step.accumulation)
    isolation, attention = choose_attention(
        engine.unwrapped, config.model.attention, accelerator.device, precision,
        encoder.vocabulary_size,
    )  # fmt: skip
    micro_batch_tokens = config.batch.batch_size * config.data.max_seq_length
    loss = choose_loss(
        engine.unwrapped, config.model.loss, accelerator.device, micro_batch_tokens, precision,
        may_compile=config.model.compile is not False,
    )  # fmt: skip
    if checkpoint:
        put = functools.partial(restore, engine, checkpoint, config.optimizer.optimizer)
        notes += filter(None, [on_all(accelerator, put)])
    reader = StepReader(
        corpus.train, index, step.blocks, step.accumulation, accelerator.process_index,
        accelerator.num_processes, config.run.seed, pins=accelerator.device.type == "cuda",
    )  # fmt: skip
    why = f" ({loss.reason})" if loss.reason else ""
    speed_lines = [f"loss       {loss.kind}{why}; gradient checkpointing {activations}"]
    is_over = progress.step == last_step
    if not is_over and compiles(config.model, accelerator, engine, micro_batches):
        micro_batch = reader.read(progress.blocks_seen).micro_batches[0]
        is_wanted = config.model.compile is True
        speed_lines.append(compile_and_warm_up(engine, accelerator, loss, micro_batch, is_wanted))

    with explaining_disk_errors(run.logs):
        report = Reporter(run, config, progress.step, last_step, accelerator.is_main_process)
    checkpoints = CheckpointManager(
        store, config.checkpoint, accelerator, provenance, files, report.say
    )
    going_on = f"; going on from {checkpoint.path}" if checkpoint else ""
    opening_lines = [
        *notes,
        f"run        {run.path}",
        *describe_ledger(ledger, corpus.was_cached),
        model_line,
        f"product    {meter.matmul_flops / 1e12:.3g} TFLOP/s in {precision}, 100% of MFU",
        *([f"optimizer  {engine.optimizer.describe()}"] if len(engine.optimizer.each) > 1 else []),
        f"attention  {attention}; packed documents do not see each other (logits move by "
        f"{isolation.swapped:.0e}, alone {isolation.alone:.0e})",
        *speed_lines,
        plan_line,
        f"steps      {progress.step} of {last_step} made{going_on}",
        *(
            [
                f"step       reads {step.blocks} blocks, as this run has it from the start: "
                f"gradient_accumulation_steps is {step.accumulation} on every process, not "
                f"{config.batch.gradient_accumulation_steps}"
            ]
            if step.accumulation != config.batch.gradient_accumulation_steps
            else []
        ),
        *checkpoints.describe_space(engine, progress.step, last_step),
    ]
    report.say("\n".join(opening_lines))
    return Assembly(
        config, run, lock, accelerator, peers, tokenizer, index, reader, held_out,
        engine.model, loss, engine, step, progress, checkpoints, report, meter, plan, last_step,
    )  # fmt: skip


def _choose(
    config: Config, run: RunDirectory, store: CheckpointStore, notes: list[str]
) -> Checkpoint | None:
    """Makes sure that the folder is this run's, and finds what it goes on from."""
    told: list[str] = []
    try:
        run.refuse_another(config)
        return choose_checkpoint(config, store, told.append)
    except QloopError as error:  # what was moved aside is told in any case
        raise type(error)("\n".join([*told, str(error)])) from error
    finally:
        notes.extend(told)


def _load_data(
    config: Config, sources: list[Any], encoder: Encoder, accelerator: Accelerator
) -> tuple[Corpus, BlockIndex, HeldOut | None]:
    """Tokenises and packs both sides on the main rank; all open and map what it made."""
    data = config.data
    cache_dir = data.cache_dir or config.run.output_dir / ".cache"

    def build() -> tuple[Path, bool]:
        train, held_out = sources
        with explaining_disk_errors(cache_dir):
            built = build_corpus(
                train, held_out, encoder, cache_dir, data.held_out_share,
                data.train_on_prompt, data.deduplicate,
            )  # fmt: skip
            open_all(*built)
            return built

    def open_all(folder: Path, was_cached: bool) -> tuple[Corpus, BlockIndex, HeldOut | None]:
        with explaining_disk_errors(cache_dir):
            corpus = open_corpus(folder, encoder, was_cached)
            length, held_out = data.max_seq_length, None
            index = load_index(folder / "train", corpus.train, data.packing, length)
            if corpus.held_out:
                blocks = load_index(folder / "held_out", corpus.held_out, "best_fit", length)
                held_out = HeldOut(corpus.held_out, blocks)
            return corpus, index, held_out

    folder, was_cached = on_main(accelerator, build)
    return on_all(accelerator, lambda: open_all(folder, was_cached))


def describe_placement(accelerator: Accelerator, precision: str, micro_batches: int) -> Placement:
    """Describes the devices of this run to the plan, and how much they do."""
    engine = describe_engine(accelerator).lower().replace("-", "") or "ddp"
    return Placement(find_device(), precision, engine, accelerator.num_processes, micro_batches)


def choose_activations(config: Config, accelerator: Accelerator, plan: Plan | None) -> str:
    """Says what of the layers' activations is computed again: `off`, `selective` or `full`."""
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None and fsdp.activation_checkpointing:
        return "off"  # accelerate does it
    if plan is not None:
        return plan.activations
    mode = str(config.model.gradient_checkpointing)
    return "full" if mode == "auto" else mode


def describe_model(
    config: ModelConfig, model: torch.nn.Module, precision: str, accelerator: Accelerator
) -> str:
    """Says in the opening lines what is trained, and on what."""
    total, trained = count_parameters(model)
    engine = f", {name}" if (name := describe_engine(accelerator)) else ""
    return (
        f"model      {config.model_config_file or config.model_name}: {total:,} parameters, "
        f"{trained:,} trained ({config.training_method}, {precision}, "
        f"{accelerator.device.type} x {accelerator.num_processes}{engine})"
    )


def build_meter(
    index: BlockIndex,
    model: torch.nn.Module,
    precision: str,
    memory_before: int,
    accelerator: Accelerator,
) -> Meter:
    """Counts the model's FLOPs, while it is whole, and measures what the devices can do."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate = measure_matmul_flops(accelerator.device, dtype)
    return Meter(
        index,
        build_model_flops(model),
        rate * accelerator.num_processes,
        accelerator.device,
        memory_before,
    )
