"""Tiny models, a tiny tokenizer and a little Q: everything runs on a CPU and asks no hub."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread, here and in processes that tests start: the models are tiny, and bits must agree.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from qloop.config import Config, load_config

# Architectures that must work, as keys of a config.json beside the sizes below.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma": {"head_dim": 16},
    "phi3": {},
    "gpt2": {},
    "starcoder2": {"sliding_window": 8},
}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its state in classes; each test starts without it."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small Q files, alike enough to be learned from and all different."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        lines = [f"/ module {number}: bars and joins", f"\\d .m{number}", ""]
        for row in range(4 + number):
            lines += [
                f"bar{row}:{{[t;n] select vol:sum size, px:last price by sym, n xbar time from t}}",
                f"join{row}:{{aj[`sym`time; x; y]}} / prevailing quote, case {number * 7 + row}",
            ]
        (folder / f"module_{number:02}.q").write_text("\n".join([*lines, "\\d .", ""]))
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer trained on `corpus_dir`, with Qwen2.5's special tokens."""
    from qloop.demo.build_tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(corpus_dir, held_out_share=0.0).save_pretrained(folder)
    return folder


def write_model_config(folder: Path, model_type: str = "qwen2", **keys: Any) -> Path:
    """Writes the config.json of a model of some ten thousand parameters."""
    content = {
        "model_type": model_type,
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({"n_positions": 512} if model_type == "gpt2" else {}),
        **ARCHITECTURES.get(model_type, {}),
        **keys,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def make_config(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> Callable[..., Config]:
    """Builds the config of a run of a few seconds; keyword arguments replace keys."""

    def make(**keys: Any) -> Config:
        flags = {
            "output_dir": tmp_path / "output",
            "cache_dir": tmp_path / "cache",
            "experiment_name": "run",
            "model_config_file": write_model_config(tmp_path / "model"),
            "tokenizer_name": tokenizer_dir,
            "train_file": corpus_dir,
            "held_out_share": 0.2,
            "max_seq_length": 64,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "eval_steps": 3,
            "save_steps": 3,
            "num_samples": 0,
            "gradient_checkpointing": "false",
            **keys,
        }
        typed = {key: str(value) for key, value in flags.items() if value is not None}
        return load_config(None, typed).config

    return make
