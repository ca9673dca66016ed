"""What a run goes on from: the newest good checkpoint, if it is this run's."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qloop.checkpoint.store import CheckpointStore, DamagedError, GoodCheckpoint
from qloop.config.keys import Config, find_changes
from qloop.distributed.engine import Engine
from qloop.errors import CheckpointError, ConfigError
from qloop.steps import Progress
from qloop.storage.filesystem import FileSystem
from qloop.storage.tensors import SavedTensors

MOMENTS = "optimizer"
"""Stem of the files with the optimizer's tensors, each under its parameter's name and its own."""


PROGRESS = "progress.json"


@dataclass(frozen=True)
class Provenance:
    """What a run was made of; a run goes on only with the same."""

    config: dict[str, Any]
    """The config, by section."""
    fingerprints: dict[str, str]
    """Of the corpus, the tokenizer and the frozen base."""
    step_blocks: int
    """Blocks that a step reads, over all ranks."""


@dataclass(frozen=True)
class Checkpoint:
    """A step directory and what its progress.json says."""

    path: Path
    progress: Progress
    provenance: Provenance


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads what a step directory says of itself; it was verified before.

    Raises:
        CheckpointError: It is no checkpoint of qloop.
    """
    try:
        content = json.loads((path / PROGRESS).read_bytes())
        counters = {field.name: content[field.name] for field in dataclasses.fields(Progress)}
        provenance = {field.name: content[field.name] for field in dataclasses.fields(Provenance)}
        return Checkpoint(path, Progress(**counters), Provenance(**provenance))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no checkpoint to go on from: {PROGRESS}: {error}; give a checkpoint-N folder"
        ) from error


def config_of(checkpoint: Checkpoint) -> Config:
    """Gives the config that a checkpoint was made with.

    Raises:
        CheckpointError: Its keys are none of this version of qloop.
    """
    try:
        return Config.model_validate(checkpoint.provenance.config)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its config is none of this version of qloop: {error}; use the "
            "version that wrote it"
        ) from error


_WORDS = ("auto", "never", "restart")


def choose_checkpoint(
    config: Config, store: CheckpointStore, tell: Callable[[str], None]
) -> Checkpoint | None:
    """Finds what to go on from; every byte of it is as it was written.

    Args:
        config: With `resume`.
        store: The run's own checkpoints.
        tell: Gets a line on each damaged checkpoint; it is moved aside.

    Raises:
        ConfigError: Going on would overwrite steps, or change what the run is.
        CheckpointError: The checkpoint that was asked for is damaged or missing; or all are
            damaged, and starting anew was not asked for.
    """
    resume = config.run.resume
    try:
        newest = store.find_newest(tell)
    except OSError as error:
        raise CheckpointError(f"{store.folder}: cannot be read or mended: {error}") from error
    if newest is None and resume == "auto":
        _refuse_to_start_afresh(store)
    if resume == "restart":
        _refuse_to_overwrite(newest)
    path = newest.path if newest else None
    if resume not in _WORDS:
        path = Path(resume)
        _verify_named(path)
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    changes = find_changes(config_of(checkpoint), config)
    if changes:
        raise ConfigError(
            f"{path}: was made with other settings:\n  " + "\n  ".join(changes) + "\n"
            "take its own values to go on with it, or name the keys that may change: "
            f"--allow_change {','.join(change.split(':')[0] for change in changes)}"
        )
    if newest and newest.manifest.step > checkpoint.progress.step:
        raise ConfigError(
            f"resume: {path} is older than {newest.path}, whose steps would be written anew; give "
            "another --experiment_name to branch off, or --resume auto to go on from the newest"
        )
    return checkpoint


def refuse_other_provenance(
    checkpoint: Checkpoint, provenance: Provenance, allow_change: tuple[str, ...]
) -> None:
    """Makes sure that a run goes on with what it was made of.

    Raises:
        ConfigError: The corpus, the tokenizer or the frozen base is another, and `allow_change`
            does not name it.
    """
    before, now = checkpoint.provenance.fingerprints, provenance.fingerprints
    other = [name for name in now if before.get(name) != now[name] and name not in allow_change]
    if other:
        shown = [f"{name}: {str(before.get(name))[:12]} -> {now[name][:12]}" for name in other]
        raise ConfigError(
            f"{checkpoint.path}: was made of something else, so going on would make another run "
            "of it:\n  " + "\n  ".join(shown) + "\n"
            "bring back what was there, or give another --experiment_name, or say that it may "
            f"change: --allow_change {','.join(other)}"
        )


def _refuse_to_start_afresh(store: CheckpointStore) -> None:
    damaged = [path.name for path in store.list_damaged()]
    if damaged:
        raise CheckpointError(
            f"{store.folder}: no good checkpoint is left, only {', '.join(damaged)}; bring one "
            "back from a copy under its own name, or start at step 0 with --resume restart"
        )


def _refuse_to_overwrite(newest: GoodCheckpoint | None) -> None:
    if newest:
        raise ConfigError(
            f"resume: restart is for runs whose checkpoints are all damaged, but {newest.path} is "
            "good; give --resume auto to go on, or another --experiment_name to start anew"
        )


def _verify_named(path: Path) -> None:
    try:
        CheckpointStore(path.parent, FileSystem()).verify(path)
    except (DamagedError, OSError) as error:
        raise CheckpointError(
            f"resume: {path}: not a good checkpoint: {error}; give another, or --resume auto for "
            "the newest good one"
        ) from error


def restore(engine: Engine, checkpoint: Checkpoint, optimizer: str) -> str:
    """Puts the saved state into an engine whose model was built from the same checkpoint.

    Moments are kept by an optimizer that was changed, too, where it keeps the very same ones.

    Args:
        engine: As built.
        checkpoint: What the run goes on from.
        optimizer: That of the config; `allow_change` let it differ from the checkpoint's.

    Returns:
        A line for the person where the moments start anew; empty where they go on.

    Raises:
        CheckpointError: The names, types or shapes are not those of this model; nothing was put.
    """
    stem, _ = engine.collect_weights()
    weights = SavedTensors(checkpoint.path, stem)
    moments = SavedTensors(checkpoint.path, MOMENTS)
    before = config_of(checkpoint).optimizer.optimizer
    if before != optimizer and moments.kinds != engine.moment_kinds():
        engine.restore(weights, None)
        return f"optimizer  {before} -> {optimizer}: its moments start anew, as at step 1"
    engine.restore(weights, moments)
    return ""
