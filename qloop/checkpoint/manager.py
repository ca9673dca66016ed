"""Saves step directories that are whole as soon as they have their name; restores runs from them.

    checkpoint-100/
      model.safetensors, config.json       full: `from_pretrained` loads the folder as it is
      adapter_model.safetensors, ...       lora, qlora: `PeftModel.from_pretrained` does
      tokenizer.json, ...
      optimizer.safetensors                moments by parameter name: `lm_head.weight/exp_avg`
      progress.json                        counters, config, and what the run was made of

There is no pointer to the newest one: it is the highest number.
"""

import dataclasses
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qloop.checkpoint import filesystem
from qloop.errors import CheckpointError
from qloop.progress import Progress

_NAME = re.compile(r"checkpoint-(\d+)")
_OPTIMIZER = "optimizer.safetensors"
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class Checkpoint:
    """A step directory and what its progress.json says."""

    path: Path
    progress: Progress
    config: dict[str, Any]
    """The config of the run that wrote it, by section."""
    fingerprints: dict[str, str]
    """Of the corpus, the tokenizer and the frozen base: a run goes on only with the same."""


class CheckpointManager:
    """The checkpoints of one run; every rank calls, the main one writes."""

    def __init__(self, folder: Path, keep_checkpoints: int, accelerator: Accelerator) -> None:
        self._folder = folder
        self._keep = keep_checkpoints
        self._accelerator = accelerator

    def newest(self) -> Path | None:
        """The checkpoint of the highest step, if there is any."""
        paths = self.list()
        return paths[-1] if paths else None

    def list(self) -> list[Path]:
        """All checkpoints, the oldest first."""
        if not self._folder.is_dir():
            return []
        named = ((_NAME.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [path for _, path in sorted((int(m[1]), path) for m, path in named if m)]

    def save(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        config: dict[str, Any],
        fingerprints: dict[str, str],
    ) -> Path:
        """Writes checkpoint-N beside its name, publishes it, and only then removes the oldest.

        Raises:
            CheckpointError: The disk refused; nothing of it stays, and every older checkpoint is
                there.
        """
        path = self._folder / f"checkpoint-{progress.step}"
        weights = self._accelerator.get_state_dict(model)
        if self._accelerator.is_main_process:
            filesystem.remove_unfinished(self._folder)
            temporary = self._folder / f".{path.name}-{uuid.uuid4().hex[:8]}"
            plain = self._accelerator.unwrap_model(model)
            try:
                _save_model(plain, weights, temporary)
                tokenizer.save_pretrained(temporary)
                moments = _name_moments(plain, optimizer)
                filesystem.write_tensors(temporary / _OPTIMIZER, moments)
                filesystem.write_json(
                    temporary / _PROGRESS,
                    {
                        **dataclasses.asdict(progress),
                        "fingerprints": fingerprints,
                        "versions": {"torch": torch.__version__, "numpy": np.__version__},
                        "config": config,
                    },
                )
                filesystem.publish(temporary, path)
            except OSError as error:
                filesystem.remove_unfinished(self._folder)
                raise CheckpointError(
                    f"{path}: could not be saved: {error}; older checkpoints are untouched; "
                    "make room and type the same command again"
                ) from error
            for old in self.list()[: -self._keep]:
                filesystem.remove(old)
        self._accelerator.wait_for_everyone()
        return path

    def restore_optimizer(
        self, checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Puts the saved moments into the optimizer, each to the parameter of its name.

        Raises:
            CheckpointError: The names or shapes are not those of this model.
        """
        plain = self._accelerator.unwrap_model(model)
        try:
            saved = filesystem.read_tensors(checkpoint.path / _OPTIMIZER)
        except Exception as error:  # safetensors has no common base for its errors
            raise CheckpointError(
                f"{checkpoint.path / _OPTIMIZER}: not readable: {error}"
            ) from error
        trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        moments: dict[str, dict[str, torch.Tensor]] = {name: {} for name in trained}
        for key, tensor in saved.items():
            name, _, moment = key.rpartition("/")
            fits = name in trained and tensor.shape in (trained[name].shape, torch.Size([]))
            if not fits:
                raise CheckpointError(
                    f"{checkpoint.path / _OPTIMIZER}: {key} of shape {tuple(tensor.shape)} fits no "
                    "trained parameter of this model"
                )
            # A step count stays where AdamW keeps it, everything else is of the parameter's kind.
            moments[name][moment] = tensor.to(trained[name].device)
        empty = [name for name, found in moments.items() if not found]
        if empty:
            raise CheckpointError(
                f"{checkpoint.path / _OPTIMIZER}: has no moments of {len(empty)} trained "
                f"parameters, the first {empty[0]}"
            )
        for name, parameter in trained.items():
            optimizer.state[parameter] = moments[name]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads what a step directory says of itself.

    Raises:
        CheckpointError: It is no checkpoint of qloop.
    """
    try:
        content = filesystem.read_json(path / _PROGRESS)
        counters = {field.name: content[field.name] for field in dataclasses.fields(Progress)}
        return Checkpoint(path, Progress(**counters), content["config"], content["fingerprints"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: no checkpoint to go on from: {_PROGRESS}: {error}; give a checkpoint-N folder"
        ) from error


def _save_model(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    if hasattr(model, "peft_config"):
        # The embedding layers belong to the base; "auto" would ask the hub about them.
        model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    else:
        model.save_pretrained(folder, state_dict=weights)


def _name_moments(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{moment}": tensor
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for moment, tensor in optimizer.state[parameter].items()
    }
