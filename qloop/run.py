"""Builds a run from its config, in the order in which failures are cheapest.

The builders have small results: the folder, the data, the model with its plan, the engine. With the
reports they are a `Run`, with which `train.py` makes steps.
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
from qloop.config.keys import Config, as_flag, dump_config
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Data:
    """The corpus as tokens and blocks, with its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    corpus: Corpus
    index: BlockIndex
    held_out: HeldOut | None

    def describe(self) -> dict[str, Any]:
        """Returns the content of data_report.json: the ledger with the figures of packing."""
        return describe_corpus(
            self.corpus, self.index, self.held_out.index if self.held_out else None
        )


@dataclass(frozen=True)
class BuiltModel:
    """The model before an engine wraps it, with its plan and what was chosen for it."""

    model: PreTrainedModel
    placement: Placement
    num_parameters: int
    num_trained: int
    kernels: Kernels
    recomputation: str
    plan: Plan | str
    """Why there is none, for a model that cannot be simulated."""
    meter: Meter
    provenance: Provenance


@dataclass(frozen=True)
class Prepared:
    """The engine with the run's state, checked and ready to make steps."""

    engine: Engine
    attention: AttentionChoice
    isolation: Isolation
    target_loss: TargetLoss
    batches: StepReader
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
    prepared: Prepared
    layout: StepLayout
    progress: Progress
    last_step: int
    model: torch.nn.Module
    """As prepared by accelerate: for the forward pass of a step."""
    engine: Engine
    target_loss: TargetLoss
    batches: StepReader
    meter: Meter
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
        flags = {key: as_flag(value) for key, value in keys.items()}
        config = load_config(Path(config), flags).config
    elif keys:
        raise ConfigError(f"open_run: {', '.join(keys)}: give keys with a file, or a whole config")
    run = build_run(config)
    run.model.train()
    try:
        yield run
        run.checkpoints.poll(wait=True)  # on all ranks; after an error, close does what it can
    finally:
        run.checkpoints.close()
        run.close()


def build_run(config: Config, notes: Sequence[str] = ()) -> Run:
    """Builds everything, from the run's folder to the reports, and restores its checkpoint.

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
    saved_blocks = None
    if checkpoint and "step_blocks" not in config.run.allow_change:
        saved_blocks = checkpoint.provenance.step_blocks
    path = checkpoint.path if checkpoint else None
    layout = divide_step(config.batch, accelerator.num_processes, saved_blocks, path)
    data = build_data(config, accelerator)
    length, blocks = config.data.max_seq_length, len(data.index)
    last_step = count_steps(config.schedule, config.batch, length, blocks, layout.blocks, progress)
    placement = Placement(
        find_device(),
        choose_precision(config.model.precision, accelerator.device),
        name_engine(accelerator),
        accelerator.num_processes,
        last_step * layout.accumulation,
        launcher_recomputes(accelerator),
    )
    built = build_model_and_plan(config, data, path, placement, layout, accelerator)
    if checkpoint:
        refuse_other_provenance(checkpoint, built.provenance, config.run.allow_change)
    on_main(accelerator, lambda: _write_folder(folder.directory, config, data))
    first_blocks = progress.blocks_seen if progress.step < last_step else None
    files = collect_files(built.model, data.tokenizer)
    prepared = prepare(config, data, built, checkpoint, layout, first_blocks, accelerator)
    with explaining_disk_errors(folder.directory.logs):
        report = Reporter(
            folder.directory, config, progress.step, last_step, accelerator.is_main_process
        )
    checkpoints = CheckpointManager(
        store=folder.store,
        settings=config.checkpoint,
        accelerator=accelerator,
        provenance=built.provenance,
        files=files,
        say=report.say,
    )
    return Run(
        config=config, notes=notes, accelerator=accelerator, peers=peers, folder=folder, data=data,
        built=built, prepared=prepared, layout=layout, progress=progress, last_step=last_step,
        model=prepared.engine.model, engine=prepared.engine, target_loss=prepared.target_loss,
        batches=prepared.batches, meter=built.meter, report=report, checkpoints=checkpoints,
    )  # fmt: skip


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
    return Folder(directory, lock, store, checkpoint, tuple(messages))


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
    return Data(tokenizer, encoder, corpus, index, held_out)


def build_model_and_plan(
    config: Config,
    data: Data,
    checkpoint: Path | None,
    placement: Placement,
    layout: StepLayout,
    accelerator: Accelerator,
) -> BuiltModel:
    """Builds the model on the CPU, plans its memory, and chooses its kernels."""
    memory_before = measure_memory(accelerator.device).now
    build = functools.partial(
        build_model,
        config.model,
        config.lora,
        placement.precision,
        accelerator.device,
        seed=config.run.seed,
        checkpoint=checkpoint,
        is_sharded=placement.engine == "fsdp2",
        reads_weights=reads_weights(accelerator),
    )
    model = on_all(accelerator, build)
    dtype = torch.bfloat16 if placement.precision == "bf16" else torch.float32
    rate = measure_matmul_flops(accelerator.device, dtype) * accelerator.num_processes
    # Counted here, while the model is whole.
    meter = Meter(data.index, build_model_flops(model), rate, accelerator.device, memory_before)
    plan: Plan | str
    try:
        plan = make_plan(config, placement)
        recomputation = plan.recomputation
    except PlanError as error:  # no reason not to train
        plan, recomputation = str(error), choose_recomputation(config, placement)
    kernels = choose_kernels(model, config, placement)
    set_recomputation(model, recomputation, config.model.offload_activations)
    fingerprints = {
        "corpus": data.corpus.fingerprint,
        "tokenizer": data.encoder.fingerprint,
        # Under FSDP2 only the main rank has read the weights.
        "frozen_weights": on_main(accelerator, lambda: fingerprint_weights(model)),
    }
    provenance = Provenance(dump_config(config), fingerprints, layout.blocks)
    sizes = count_parameters(model)
    return BuiltModel(model, placement, *sizes, kernels, recomputation, plan, meter, provenance)


def prepare(
    config: Config,
    data: Data,
    built: BuiltModel,
    checkpoint: Checkpoint | None,
    layout: StepLayout,
    first_blocks: int | None,
    accelerator: Accelerator,
) -> Prepared:
    """Wraps the model in its engine, checks attention and loss on it, and restores the moments.

    `first_blocks` are the blocks seen before the next step; None if no step is left.
    """
    engine = build_engine(accelerator, built.model, config.optimizer, layout.accumulation)
    attention, isolation = set_attention(
        engine.unwrapped,
        built.kernels.attention,
        is_wanted=config.model.attention == DOCUMENTS,
        precision=built.placement.precision,
        vocabulary_size=data.encoder.vocabulary_size,
    )
    target_loss = build_target_loss(
        engine.unwrapped,
        built.kernels.loss,
        is_wanted=config.model.loss != "auto",
        device=accelerator.device,
        precision=built.placement.precision,
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
    return Prepared(engine, attention, isolation, target_loss, batches, restored, compilation)


def compile_and_warm_up(
    engine: Engine, target_loss: TargetLoss, micro_batch: MicroBatch, is_wanted: bool
) -> str:
    """Compiles the layers by a forward and backward pass whose gradients are dropped.

    If it was not `is_wanted`, a failure leaves the layers uncompiled.

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


def _write_folder(directory: RunDirectory, config: Config, data: Data) -> None:
    with explaining_disk_errors(directory.path):
        directory.create(config)
        write_json(directory.data_report, data.describe())
