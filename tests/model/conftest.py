"""Saved bases, each built once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import build, change_tensors
from workspace import write_model_config


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Callable[..., Path]:
    """Gives the folder of a saved base; each is built once."""
    built: dict[str, Path] = {}

    def base(architecture: str = "qwen2", seed: int = 0, **keys) -> Path:
        name = f"{architecture}-{seed}-{json.dumps(keys)}"
        if name not in built:
            folder = tmp_path_factory.mktemp(architecture)
            keys = {"initializer_range": 0.2, **keys}
            file = write_model_config(folder / "config", architecture, **keys)
            build(file, seed=seed).save_pretrained(folder / "base")
            built[name] = folder / "base"
        return built[name]

    return base


@pytest.fixture
def spoil(bases, tmp_path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]:
    """Copies the Qwen2 base with its tensors changed."""

    def copy(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = tmp_path / "spoiled"
        shutil.copytree(bases(), folder)
        change_tensors(folder / "model.safetensors", change)
        return folder

    return copy
