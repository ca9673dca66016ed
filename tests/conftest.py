"""Tiny models, a tiny tokenizer and a little Q: everything runs on a CPU and asks no hub."""

import os
from collections.abc import Callable
from pathlib import Path

# One thread, here and in processes that tests start: the models are tiny, and bits must agree.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from workspace import Workspace, reset_accelerate, write_corpus, write_tokenizer

from qloop.config.keys import Config


def pytest_xdist_auto_num_workers() -> int:
    """Gives the number of files that are tried at once, unless `-n` says another (0: for pdb)."""
    return min(4, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    reset_accelerate()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little Q, as files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on `corpus_dir`."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), corpus_dir)


@pytest.fixture
def make_config(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> Callable[..., Config]:
    """Builds the config of a run of a few seconds; keyword arguments replace keys."""
    return Workspace(tmp_path, corpus_dir, tokenizer_dir).make_config
