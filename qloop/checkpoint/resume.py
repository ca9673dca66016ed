"""Resuming: chooses a checkpoint, checks that it belongs to the run, and loads its state."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qloop.checkpoint.store import CheckpointStore, GoodCheckpoint, find_checkpoint
from qloop.config.keys import Config, find_changes
from qloop.distributed.engine import Engine
from qloop.errors import CheckpointError, ConfigError
from qloop.steps import Progress
from qloop.storage.tensors import SavedTensors

MOMENTS = "optimizer"
"""Stem of the optimizer's files; their tensors are named `parameter/moment`."""

PROGRESS = "progress.json"
"""The file of counters and provenance; its keys are the fields of Progress and Provenance."""

_WORDS = ("auto", "never", "restart")


@dataclass(frozen=True)
class Provenance:
    """Config and inputs of a run; a checkpoint is resumed only with the same ones."""

    config: dict[str, Any]
    fingerprints: dict[str, str]
    """Of the corpus, the tokenizer and the frozen base."""
    step_blocks: int
    """Blocks in a step, over all ranks."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and the content of its progress.json."""

    path: Path
    progress: Progress
    provenance: Provenance


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads progress.json of a verified checkpoint.

    Raises:
        CheckpointError: The folder is not a checkpoint of qloop.
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
    """Returns the config that a checkpoint was saved with.

    Raises:
        CheckpointError: This version of qloop does not accept it.
    """
    try:
        return Config.model_validate(checkpoint.provenance.config)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its config is none of this version of qloop: {error}; use the "
            "version that wrote it"
        ) from error


def choose_checkpoint(
    config: Config, store: CheckpointStore, say: Callable[[str], None]
) -> Checkpoint | None:
    """Chooses the checkpoint to resume and verifies every byte of it.

    Damaged checkpoints of the run itself, those in `store`, are moved aside.

    Returns:
        None if the run starts at step 0.

    Raises:
        ConfigError: Resuming would overwrite newer steps, or the config differs.
        CheckpointError: The checkpoint that `resume` names is damaged or missing; or all are
            damaged, and `resume` is "auto".
    """
    resume = config.run.resume
    try:
        newest = store.find_newest(say)
    except OSError as error:
        raise CheckpointError(f"{store.folder}: cannot be read or mended: {error}") from error
    if newest is None and resume == "auto":
        _refuse_to_start_afresh(store)
    if resume == "restart":
        _refuse_to_overwrite(newest)
    path = newest.path if newest else None
    if resume not in _WORDS:
        path = _find_named(resume, say)
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
    """Refuses to resume with another corpus, tokenizer or base.

    Raises:
        ConfigError: A fingerprint differs, and `allow_change` does not name it.
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


def restore(engine: Engine, checkpoint: Checkpoint, optimizer: str) -> str:
    """Loads the saved state into an engine whose model was built from the same checkpoint.

    If the checkpoint has another optimizer than the config's `optimizer`, its moments are loaded
    only if names, types and shapes match.

    Returns:
        A line for the user if the moments start at zero; empty if they were loaded.

    Raises:
        CheckpointError: Names, types or shapes are not those of this model; nothing was loaded.
    """
    stem, _ = engine.collect_weights()
    weights = SavedTensors(checkpoint.path, stem)
    moments = SavedTensors(checkpoint.path, MOMENTS)
    before = config_of(checkpoint).optimizer.optimizer
    if before != optimizer and moments.specs != engine.moment_specs():
        engine.restore(weights, None)
        return f"optimizer  {before} -> {optimizer}: its moments start anew, as at step 1"
    engine.restore(weights, moments)
    return ""


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


def _find_named(resume: str, say: Callable[[str], None]) -> Path:
    try:
        return find_checkpoint(Path(resume), say).path
    except CheckpointError as error:
        raise CheckpointError(
            f"resume: {error}; or --resume auto for the newest good one of this run"
        ) from error
