"""Builds a run from its config, in the order in which failures are cheapest.

Five builders, each with a small result: the folder, the data, the model with its plan, the engine,
the reports. Together they are a `Run`, with which `train.py` makes steps.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qloop.checkpoint.manager import CheckpointManager
from qloop.checkpoint.resume import (
    Checkpoint,
    Provenance,
    choose_checkpoint,
    refuse_other_provenance,
    restore,
)
from qloop.checkpoint.store import CheckpointStore
from qloop.config.keys import Config
from qloop.config.loading import load_config
from qloop.data.batches import MicroBatch, StepReader
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
    launcher_recomputes,
    name_engine,
    reads_weights,
)
from qloop.distributed.engine import Engine
from qloop.distributed.peers import PeerWatch
from qloop.distributed.ranks import on_all, on_main
from qloop.errors import ConfigError, PlanError, QloopError, explaining_disk_errors
from qloop.hardware import (
    choose_precision,
    find_device,
    measure_matmul_flops,
    measure_memory,
    use_deterministic_kernels,
)
from qloop.model.activations import set_recomputation
from qloop.model.attention import DOCUMENTS, AttentionChoice
from qloop.model.build import build_model
from qloop.model.compilation import uncompile_layers, warm_up
from qloop.model.flops import build_model_flops
from qloop.model.isolation import Isolation, set_attention
from qloop.model.loss import TargetLoss, build_target_loss
from qloop.model.pretrained import check_sizes, load_model_config, load_tokenizer
from qloop.model.state import collect_files, count_parameters, fingerprint_weights
from qloop.planning.plan import (
    Kernels,
    Placement,
    Plan,
    choose_kernels,
    choose_recomputation,
    make_plan,
)
from qloop.report.files import describe_corpus
from qloop.report.metrics import Meter
from qloop.report.reporter import Reporter
from qloop.run_directory import RunDirectory, RunLock, locate_run
from qloop.steps import Progress, StepLayout, count_steps, divide_step, seed_forward_pass
from qloop.storage.filesystem import FileSystem
from qloop.storage.folders import write_json


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The run's folder, and the checkpoint that the run goes on from."""

    directory: RunDirectory
    lock: RunLock
    store: CheckpointStore
    checkpoint: Checkpoint | None
    messages: tuple[str, ...]
    """About damaged checkpoints that were moved aside."""


@dataclass(frozen=True)
class HeldOut:
    """The documents never trained on, packed."""

    store: TokenStore
    index: BlockIndex


@dataclass(frozen=True, kw_only=True)
class Data:
    """The corpus as tokens and blocks, with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    corpus: Corpus
    index: BlockIndex
    held_out: HeldOut | None
    ledger: dict[str, Any]
    """The content of data_report.json."""


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """The model before an engine wraps it, with its plan and what was chosen for it."""

    model: PreTrainedModel
    precision: str
    num_parameters: int
    num_trained: int
    kernels: Kernels
    recomputation: str
    plan: Plan | None
    why_no_plan: str
    meter: Meter
    provenance: Provenance
    files: dict[str, bytes]
    """Of every checkpoint, besides tensors and progress: configs and tokenizer, by name."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The engine with the run's state, and what it takes to make a step."""

    engine: Engine
    target_loss: TargetLoss
    batches: StepReader
    attention: AttentionChoice
    isolation: Isolation
    restored: str
    """A line about the optimizer's moments if they start anew, else empty."""
    compilation: str
    """How compiling went; empty if nothing is compiled."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to make steps."""

    config: Config
    notes: tuple[str, ...]
    """Lines for the opening."""
    accelerator: Accelerator
    peers: PeerWatch
    folder: Folder
    data: Data
    built: BuiltModel
    layout: StepLayout
    progress: Progress
    last_step: int
    model: torch.nn.Module
    """As prepared by accelerate: for the forward pass of a step."""
    engine: Engine
    target_loss: TargetLoss
    batches: StepReader
    meter: Meter
    prepared: Prepared
    report: Reporter
    checkpoints: CheckpointManager

    def close(self) -> None:
        """Ends the reports, and frees the run's folder."""
        self.peers.stop()
        self.batches.close()
        self.report.close()
        self.folder.lock.release()


@contextlib.contextmanager
def open_run(config: Config | Path | str, **keys: Any) -> Iterator[Run]:
    """Opens a run for use as a library; `qloop.make_step(run)` makes its next step.

    The run goes on from its newest checkpoint, as with the command. Nothing is printed, and nothing
    is saved unless `run.checkpoints.save` is called. The folder is free again after the block.

    Args:
        config: A TOML or YAML file, whose relative paths start at its folder; or a whole config.
        keys: Keys of the config, which replace the file's values.

    Raises:
        QloopError: Something that the config names cannot be used.
    """
    if not isinstance(config, Config):
        flags = {key: _as_flag(value) for key, value in keys.items()}
        config = load_config(Path(config), flags).config
    elif keys:
        raise ConfigError(f"open_run: {', '.join(keys)}: give keys with a file, or a whole config")
    run = build_run(config)
    try:
        yield run
    finally:
        run.checkpoints.close()
        run.close()


def _as_flag(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def build_run(config: Config, notes: Sequence[str] = ()) -> Run:
    """Builds everything, from the run's folder to the reports, and restores its checkpoint.

    Args:
        config: The whole config.
        notes: Lines for the opening.

    Raises:
        QloopError: Something that the config names cannot be used. The run's folder is free again.
    """
    if config.run.deterministic:
        use_deterministic_kernels()
    accelerator = build_accelerator(config.model, config.batch, config.optimizer)
    peers = PeerWatch(accelerator)
    directory = locate_run(config)
    lock = RunLock(directory.path)
    try:
        on_main(accelerator, lock.acquire)
        folder = open_folder(config, directory, lock, accelerator)
        return _build(config, tuple(notes), folder, accelerator, peers)
    except BaseException as error:
        lock.release()
        explained = peers.explain(error)
        peers.stop()
        if explained is error:
            raise
        raise explained from error


def _build(
    config: Config,
    notes: tuple[str, ...],
    folder: Folder,
    accelerator: Accelerator,
    peers: PeerWatch,
) -> Run:
    checkpoint = folder.checkpoint
    progress = checkpoint.progress if checkpoint else Progress()
    keeps_step = checkpoint is not None and "step_blocks" not in config.run.allow_change
    layout = divide_step(
        config.batch,
        accelerator.num_processes,
        checkpoint.provenance.step_blocks if checkpoint and keeps_step else None,
        checkpoint.path if checkpoint else None,
    )
    data = build_data(config, accelerator)
    last_step = count_steps(
        config.schedule,
        config.batch,
        config.data.max_seq_length,
        len(data.index),
        layout.blocks,
        progress,
    )
    placement = describe_placement(config, accelerator, last_step * layout.accumulation)
    built = build_model_and_plan(config, data, checkpoint, placement, layout.blocks, accelerator)
    if checkpoint:
        refuse_other_provenance(checkpoint, built.provenance, config.run.allow_change)
    on_main(accelerator, lambda: _write_folder(folder.directory, config, data.ledger))
    prepared = prepare(
        config,
        data,
        built,
        checkpoint,
        layout,
        accelerator,
        first_blocks=progress.blocks_seen if progress.step < last_step else None,
    )
    report, checkpoints = open_reports(config, folder, built, progress, last_step, accelerator)
    return Run(
        config=config,
        notes=notes,
        accelerator=accelerator,
        peers=peers,
        folder=folder,
        data=data,
        built=built,
        layout=layout,
        progress=progress,
        last_step=last_step,
        model=prepared.engine.model,
        engine=prepared.engine,
        target_loss=prepared.target_loss,
        batches=prepared.batches,
        meter=built.meter,
        prepared=prepared,
        report=report,
        checkpoints=checkpoints,
    )


def open_folder(
    config: Config, directory: RunDirectory, lock: RunLock, accelerator: Accelerator
) -> Folder:
    """Makes sure that the folder is this run's, and finds the checkpoint to go on from."""
    store = CheckpointStore(directory.checkpoints, FileSystem(), lock.check)

    def choose() -> tuple[Checkpoint | None, list[str]]:
        messages: list[str] = []
        try:
            directory.refuse_another(config)
            return choose_checkpoint(config, store, messages.append), messages
        except QloopError as error:  # checkpoints that were moved aside are named in any case
            raise type(error)("\n".join([*messages, str(error)])) from error

    checkpoint, messages = on_main(accelerator, choose)
    return Folder(
        directory=directory,
        lock=lock,
        store=store,
        checkpoint=checkpoint,
        messages=tuple(messages),
    )


def build_data(config: Config, accelerator: Accelerator) -> Data:
    """Tokenises and packs the corpus on the main rank; all ranks map the result."""
    sources: list[Source | None] = []  # on the main rank, which alone reads the corpus
    on_main(accelerator, lambda: sources.extend(find_sources(config.data)))
    tokenizer = load_tokenizer(config.model)
    encoder = build_encoder(tokenizer)
    model_config = load_model_config(config.model)
    check_sizes(model_config, encoder.vocabulary_size, config.data.max_seq_length)
    settings, length = config.data, config.data.max_seq_length
    cache_dir = settings.cache_dir or config.run.output_dir / ".cache"

    def open_all(folder: Path, was_cached: bool) -> tuple[Corpus, BlockIndex, HeldOut | None]:
        with explaining_disk_errors(cache_dir):
            corpus = open_corpus(folder, encoder, was_cached)
            index = load_index(folder / "train", corpus.train, settings.packing, length)
            if corpus.held_out is None:
                return corpus, index, None
            blocks = load_index(folder / "held_out", corpus.held_out, "best_fit", length)
            return corpus, index, HeldOut(corpus.held_out, blocks)

    def build() -> tuple[Path, bool]:
        train, held_out = sources
        assert train is not None
        with explaining_disk_errors(cache_dir):
            built = build_corpus(
                train,
                held_out,
                encoder,
                cache_dir,
                held_out_share=settings.held_out_share,
                train_on_prompt=settings.train_on_prompt,
                deduplicate=settings.deduplicate,
            )
        open_all(*built)  # so that one rank packs while the others wait
        return built

    folder, was_cached = on_main(accelerator, build)
    corpus, index, held_out = on_all(accelerator, lambda: open_all(folder, was_cached))
    return Data(
        tokenizer=tokenizer,
        encoder=encoder,
        corpus=corpus,
        index=index,
        held_out=held_out,
        ledger=describe_corpus(corpus, index, held_out.index if held_out else None),
    )


def describe_placement(config: Config, accelerator: Accelerator, micro_batches: int) -> Placement:
    """Describes the devices of this run to its plan."""
    return Placement(
        find_device(),
        choose_precision(config.model.precision, accelerator.device),
        name_engine(accelerator),
        accelerator.num_processes,
        micro_batches,
        launcher_recomputes(accelerator),
    )


def build_model_and_plan(
    config: Config,
    data: Data,
    checkpoint: Checkpoint | None,
    placement: Placement,
    step_blocks: int,
    accelerator: Accelerator,
) -> BuiltModel:
    """Builds the model on the CPU, plans its memory, and chooses its kernels."""
    device, precision = accelerator.device, placement.precision
    memory_before = measure_memory(device).now
    build = functools.partial(
        build_model,
        config.model,
        config.lora,
        precision,
        device,
        seed=config.run.seed,
        checkpoint=checkpoint.path if checkpoint else None,
        is_sharded=placement.engine == "fsdp2",
        reads_weights=reads_weights(accelerator),
    )
    model = on_all(accelerator, build)
    meter = build_meter(data.index, model, memory_before, placement, accelerator)
    plan, why_no_plan = None, ""
    try:
        plan = make_plan(config, placement)
    except PlanError as error:  # no reason not to train
        why_no_plan = str(error)
    recomputation = plan.recomputation if plan else choose_recomputation(config, placement)
    kernels = choose_kernels(model, config, placement)
    set_recomputation(model, recomputation, config.model.offload_activations)
    num_parameters, num_trained = count_parameters(model)
    fingerprints = {
        "corpus": data.corpus.fingerprint,
        "tokenizer": data.encoder.fingerprint,
        # Under FSDP2 only the main rank has read the weights.
        "frozen_weights": on_main(accelerator, lambda: fingerprint_weights(model)),
    }
    return BuiltModel(
        model=model,
        precision=precision,
        num_parameters=num_parameters,
        num_trained=num_trained,
        kernels=kernels,
        recomputation=recomputation,
        plan=plan,
        why_no_plan=why_no_plan,
        meter=meter,
        provenance=Provenance(config.model_dump(mode="json"), fingerprints, step_blocks),
        files=collect_files(model, data.tokenizer),
    )


def build_meter(
    index: BlockIndex,
    model: PreTrainedModel,
    memory_before: int,
    placement: Placement,
    accelerator: Accelerator,
) -> Meter:
    """Counts the model's FLOPs, while it is whole, and measures those of the devices."""
    dtype = torch.bfloat16 if placement.precision == "bf16" else torch.float32
    rate = measure_matmul_flops(accelerator.device, dtype)
    return Meter(
        index,
        build_model_flops(model),
        rate * accelerator.num_processes,
        accelerator.device,
        memory_before,
    )


def prepare(
    config: Config,
    data: Data,
    built: BuiltModel,
    checkpoint: Checkpoint | None,
    layout: StepLayout,
    accelerator: Accelerator,
    first_blocks: int | None,
) -> Prepared:
    """Wraps the model in its engine, checks attention and loss on it, and restores the moments.

    Args:
        config: The whole config.
        data: The corpus.
        built: The model and what was chosen for it.
        checkpoint: The run goes on from it.
        layout: Of a step.
        accelerator: The run's.
        first_blocks: Blocks seen before the next step; None if there is no step left.
    """
    engine = build_engine(accelerator, built.model, config.optimizer, layout.accumulation)
    attention, isolation = set_attention(
        engine.unwrapped,
        built.kernels.attention,
        is_wanted=config.model.attention == DOCUMENTS,
        precision=built.precision,
        vocabulary_size=data.encoder.vocabulary_size,
    )
    target_loss = build_target_loss(
        engine.unwrapped,
        built.kernels.loss,
        is_wanted=config.model.loss != "auto",
        device=accelerator.device,
        precision=built.precision,
    )
    restored = ""
    if checkpoint:
        load = functools.partial(restore, engine, checkpoint, config.optimizer.optimizer)
        restored = on_all(accelerator, load)
    batches = StepReader(
        data.corpus.train,
        data.index,
        layout,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        seed=config.run.seed,
        pins=accelerator.device.type == "cuda",
    )
    compilation = ""
    if built.kernels.compiles and first_blocks is not None:
        micro_batch = batches.read(first_blocks).micro_batches[0]
        is_wanted = config.model.compile is True
        compilation = compile_and_warm_up(engine, target_loss, micro_batch, is_wanted)
    return Prepared(
        engine=engine,
        target_loss=target_loss,
        batches=batches,
        attention=attention,
        isolation=isolation,
        restored=restored,
        compilation=compilation,
    )


def compile_and_warm_up(
    engine: Engine, target_loss: TargetLoss, micro_batch: MicroBatch, is_wanted: bool
) -> str:
    """Compiles the layers by a forward and backward pass whose gradients are dropped.

    Args:
        engine: Its model is compiled in place.
        target_loss: The model's.
        micro_batch: Any of the run, not yet on the device.
        is_wanted: Whether the config asks for it; otherwise a failure leaves layers uncompiled.

    Returns:
        How it went, for the opening lines.

    Raises:
        ConfigError: It failed and `is_wanted`.
    """
    accelerator, model = engine.accelerator, engine.model

    def forward_backward() -> None:
        seed_forward_pass(0)
        engine.backward(target_loss.sum(model, micro_batch.to(accelerator.device)) * 0.0, 1)

    was_training = model.training
    model.train()
    try:
        return on_all(accelerator, lambda: warm_up(engine.unwrapped, forward_backward))
    except ConfigError as error:
        uncompile_layers(engine.unwrapped)
        if is_wanted:
            raise
        return f"nothing: {error}; layers may keep more than planned"
    finally:
        engine.optimizer.zero_grad()
        model.train(was_training)


def open_reports(
    config: Config,
    folder: Folder,
    built: BuiltModel,
    progress: Progress,
    last_step: int,
    accelerator: Accelerator,
) -> tuple[Reporter, CheckpointManager]:
    """Opens the log files, cut back to the run's step, and the checkpoint manager."""
    with explaining_disk_errors(folder.directory.logs):
        report = Reporter(
            folder.directory, config, progress.step, last_step, accelerator.is_main_process
        )
    checkpoints = CheckpointManager(
        folder.store, config.checkpoint, accelerator, built.provenance, built.files, report.say
    )
    return report, checkpoints


def _write_folder(directory: RunDirectory, config: Config, ledger: dict[str, Any]) -> None:
    with explaining_disk_errors(directory.path):
        directory.create(config)
        write_json(directory.data_report, ledger)
