"""What a checkpoint says of itself, and how its tensors come back into an engine."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qloop.config.keys import Config
from qloop.distributed.engine import Engine
from qloop.errors import CheckpointError
from qloop.steps import Progress
from qloop.storage.tensors import SavedTensors

MOMENTS = "optimizer"
"""Stem of the files with the optimizer's tensors, each under its parameter's name and its own."""
PROGRESS = "progress.json"


@dataclass(frozen=True)
class Origins:
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
    origins: Origins


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads what a step directory says of itself; it was verified before.

    Raises:
        CheckpointError: It is no checkpoint of qloop.
    """
    try:
        content = json.loads((path / PROGRESS).read_bytes())
        counters = {field.name: content[field.name] for field in dataclasses.fields(Progress)}
        origins = {field.name: content[field.name] for field in dataclasses.fields(Origins)}
        return Checkpoint(path, Progress(**counters), Origins(**origins))
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
        return Config.model_validate(checkpoint.origins.config)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its config is none of this version of qloop: {error}; use the "
            "version that wrote it"
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
