"""The one door to the disk for checkpoints: a folder has its name when it is on the disk."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def write_json(file: Path, content: Any) -> None:
    """Writes JSON that a person can read."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def read_json(file: Path) -> Any:
    """Reads JSON."""
    return json.loads(file.read_text(encoding="utf-8"))


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Reads safetensors to the CPU."""
    return load_file(file)


def publish(folder: Path, name: Path) -> None:
    """Gives a finished folder its name: every file is on the disk first, and the name after."""
    for parent, _, files in os.walk(folder):
        for file in files:
            _sync(Path(parent, file))
        _sync(Path(parent))
    folder.rename(name)
    _sync(name.parent)


def remove(folder: Path) -> None:
    """Deletes a folder; it loses its name first, so that nobody ever sees a part of it."""
    trash = folder.with_name(f".trash-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash)


def remove_unfinished(parent: Path) -> None:
    """Deletes what an interrupted save or removal left; those names begin with a dot."""
    for folder in parent.glob(".*"):
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
