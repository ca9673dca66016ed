"""Tiny runs for tests and for the scripts beside them: a little Q, a tokenizer, a model config."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from qloop.checkpoint.store import CheckpointStore, GoodCheckpoint
from qloop.config.keys import Config
from qloop.config.loading import load_config
from qloop.data.corpus import Corpus, build_corpus, open_corpus
from qloop.data.documents import Source
from qloop.data.encoder import Encoder

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


def reset_accelerate() -> None:
    """Accelerate keeps its state in classes; a second run of a process starts without it."""
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()


def write_corpus(folder: Path) -> Path:
    """Writes twelve small Q files, alike enough to be learned from and all different."""
    for number in range(12):
        lines = [f"/ module {number}: bars and joins", f"\\d .m{number}", ""]
        for row in range(4 + number):
            lines += [
                f"bar{row}:{{[t;n] select vol:sum size, px:last price by sym, n xbar time from t}}",
                f"join{row}:{{aj[`sym`time; x; y]}} / prevailing quote, case {number * 7 + row}",
            ]
        (folder / f"module_{number:02}.q").write_text("\n".join([*lines, "\\d .", ""]))
    return folder


def write_tokenizer(folder: Path, corpus: Path) -> Path:
    """Writes a byte-level BPE tokenizer trained on a corpus, with Qwen2.5's special tokens."""
    from demo_tokenizer import build_tokenizer

    build_tokenizer(corpus, held_out_share=0.0).save_pretrained(folder)
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


def load_corpus(
    train: Source, held_out: Source | None, encoder: Encoder, cache_dir: Path, **settings: Any
) -> Corpus:
    """Builds a corpus, unless it is cached, and opens it; by default nothing is held out."""
    settings = {"held_out_share": 0.0, "train_on_prompt": False, "deduplicate": True, **settings}
    folder, was_cached = build_corpus(train, held_out, encoder, cache_dir, **settings)
    return open_corpus(folder, encoder, was_cached)


def write_checkpoint(
    store: CheckpointStore,
    step: int,
    files: Iterable[tuple[str, Iterable[memoryview]]],
    facts: Mapping[str, Any],
    held_out_loss: float | None = None,
) -> GoodCheckpoint:
    """Makes the calls of a save, in the manager's order."""
    unfinished = store.begin(step)
    try:
        written = {name: store.write_file(unfinished, name, content) for name, content in files}
        return store.commit(unfinished, step, written, facts, held_out_loss)
    except OSError:
        store.abandon(unfinished)
        raise


class Workspace:
    """A folder with what tiny runs need, and their output."""

    def __init__(self, folder: Path, corpus: Path | None = None, tokenizer: Path | None = None):
        """Writes corpus and tokenizer where none are given."""
        self.folder = folder
        if corpus is None:
            (folder / "corpus").mkdir(parents=True)
            corpus = write_corpus(folder / "corpus")
        self.corpus = corpus
        self.tokenizer = tokenizer or write_tokenizer(folder / "tokenizer", corpus)

    def flags(self, **keys: Any) -> dict[str, str]:
        """Gives the flags of a run of a few seconds; keyword arguments replace keys."""
        flags = {
            "output_dir": self.folder / "output",
            "cache_dir": self.folder / "cache",
            "experiment_name": "run",
            "model_config_file": write_model_config(self.folder / "model"),
            "tokenizer_name": self.tokenizer,
            "train_file": self.corpus,
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
        return {key: str(value) for key, value in flags.items() if value is not None}

    def make_config(self, **keys: Any) -> Config:
        """Builds the config of such a run."""
        return load_config(None, self.flags(**keys)).config

    def losses(self, name: str, **keys: Any) -> list[float]:
        """Runs to the end; gives the loss of every step."""
        from qloop.report.files import read_records
        from qloop.train import train

        reset_accelerate()
        train(self.make_config(experiment_name=name, **keys), [])
        records = read_records(self.folder / "output" / name / "logs/metrics.jsonl")
        return [record["loss"] for record in records]

    def losses_compiled_once(self, name: str, **keys: Any) -> list[float]:
        """Runs compiled, and makes sure that no step compiles anything; gives their losses."""
        from qloop.distributed.stops import StopRequest
        from qloop.model.compilation import count_compilations
        from qloop.report.files import read_records
        from qloop.run import build_run
        from qloop.train import run_steps

        reset_accelerate()
        run = build_run(self.make_config(experiment_name=name, compile="true", **keys))
        before = count_compilations()
        assert before > 0
        with StopRequest() as stop:
            run_steps(run, stop)
        run.close()
        assert count_compilations() == before
        return [record["loss"] for record in read_records(run.folder.directory.metrics)]

    def method_keys(self, method: str) -> dict[str, Any]:
        """Gives the keys that a method needs; adapters get a base, trained on first use."""
        if method == "full":
            return {}
        base = self.folder / "output/base/checkpoints/checkpoint-3"
        if not base.exists():
            from qloop.train import train

            reset_accelerate()
            train(self.make_config(experiment_name="base", max_steps=3), [])
        return {
            "model_config_file": None,
            "tokenizer_name": None,
            "model_name": base,
            "training_method": method,
            "lora_dropout": 0.2,
        }
