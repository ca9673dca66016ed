"""Trains Qwen2.5's sizes from random weights on one GPU, row by row; gpu.sh starts it.

A row that fails, or for which no time is left, says so in the table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from contestants import Setup, is_installed
from render import format_gpu, save
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "qloop/demo"
CHOSEN = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "liger_kernel")
SECONDS = 460
"""Time limit of all rows together."""

# hidden, layers, intermediate, heads, key heads, vocabulary, tied: as in the published config.json.
SIZES = {
    "0.5B": (896, 24, 4864, 14, 2, 151_936, True),
    "1.5B": (1536, 28, 8960, 12, 2, 151_936, True),
    "7B": (3584, 28, 18_944, 28, 4, 152_064, False),
    "tiny": (64, 2, 128, 2, 1, 8192, True),
}


class Row(NamedTuple):
    """A run."""

    size: str
    method: str
    batch_size: int
    length: int
    contestant: str = "qloop"
    flags: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        extra = "".join(f", {key} {value}" for key, value in self.flags if key != "compile")
        return f"{self.size} {self.method}, {self.batch_size} x {self.length}{extra}"


COMPILED = (("compile", "true"),)  # as a run of real length does by itself
SMALLER = (*COMPILED, ("gradient_checkpointing", "selective"))
SMALLEST = (*COMPILED, ("gradient_checkpointing", "full"))
ROWS = {
    "qloop": [
        Row("1.5B", "full", 8, 2048, flags=COMPILED),
        Row("7B", "lora", 4, 2048, flags=COMPILED),
        Row("7B", "qlora", 4, 2048, flags=COMPILED),
        Row("7B", "full", 1, 2048, flags=COMPILED),
        Row("7B", "qlora", 1, 2048, flags=SMALLER),
        Row("0.5B", "full", 4, 2048, flags=SMALLEST),
        Row("1.5B", "full", 4, 4096, flags=COMPILED),
        Row("7B", "lora", 2, 4096, flags=COMPILED),
        Row("7B", "qlora", 2, 4096, flags=COMPILED),
    ],
    "peers": [
        Row("1.5B", "full", 8, 2048, "TRL at its best"),
        Row("1.5B", "full", 1, 2048, "TRL as the reference has it"),
        Row("7B", "lora", 4, 2048, "TRL at its best"),
        Row("7B", "lora", 1, 2048, "TRL as the reference has it"),
        Row("7B", "lora", 2, 2048, "TRL at its best"),
    ],
    "tiny": [
        Row("tiny", "full", 2, 128),
        Row("tiny", "lora", 2, 128),
        Row("tiny", "qlora", 2, 128),
        Row("tiny", "full", 2, 128, flags=(("optimizer", "adamw_8bit"),)),
    ],
}


def write_base(folder: Path, size: str) -> Path:
    """Writes random weights in bf16, some gigabytes a file; each is a repeated random row."""
    from qloop.config.keys import ModelConfig
    from qloop.planning.meta_model import build_meta_model

    base = folder / size
    if base.exists():
        return base
    base.mkdir()
    hidden, layers, intermediate, heads, key_heads, vocabulary, tied = SIZES[size]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32_768,
        "rope_theta": 1e6,
        "dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config))
    from qloop.config.keys import LoraConfig

    shapes = build_meta_model(ModelConfig(model_name=str(base)), LoraConfig(), "bf16")
    values = torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02
    values = values.to(torch.bfloat16)
    files: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, str] = {}
    for name, parameter in shapes.named_parameters():
        count = parameter.numel()
        flat = values.repeat(-(-count // len(values)))[:count]
        tensor = torch.ones(count, dtype=torch.bfloat16) if "norm" in name else flat
        files[-1][name] = tensor.view(parameter.shape).contiguous()
        if sum(some.nbytes for some in files[-1].values()) > 4e9:
            flush(base, files, index)
    flush(base, files, index)
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (base / "model.safetensors.index.json").write_text(json.dumps(content))
    return base


def write_corpus(folder: Path, copies: int = 16) -> Path:
    """Writes the demo's documents several times over, each with a line that makes it another."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for file in (DEMO / "corpus").rglob("*.q"):
        for number in range(copies):
            text = f"/ copy {number}\n{file.read_text()}"
            (corpus / f"{file.stem}_{number}.q").write_text(text)
    return corpus


def flush(base: Path, files: list[dict[str, torch.Tensor]], index: dict[str, str]) -> None:
    """Writes the tensors that are at hand, and drops them."""
    if files[-1]:
        name = f"model-{len(files):05}.safetensors"
        save_file(files[-1], base / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(files[-1], name))
        files[-1] = {}
        files.append({})


def run(row: Row, folder: Path, corpus: Path, seconds_left: float) -> dict:
    """Runs a row in a process of its own, for as long as there is time."""
    if seconds_left < 30:
        return {"error": "not run: no time left"}
    setup = Setup(
        corpus=str(corpus),
        model=str(write_base(folder, row.size)),
        tokenizer=str(DEMO / "tokenizer"),
        method=row.method,
        batch_size=row.batch_size,
        length=row.length,
        accumulation=4 if row.contestant != "TRL as the reference has it" else 8,
        warmup_steps=1,
        steps=2,
        precision="bf16" if torch.cuda.is_available() else "fp32",
        folder=tempfile.mkdtemp(dir=folder),
        qloop_flags={"cache_dir": str(folder / "cache"), **dict(row.flags)},
    )
    file = Path(setup.folder) / "setup.json"
    file.write_text(json.dumps(setup._asdict()))
    command = [sys.executable, str(Path(__file__).with_name("contestants.py")), row.contestant]
    try:
        done = subprocess.run(
            [*command, str(file)], capture_output=True, text=True, check=False,
            timeout=min(seconds_left, 150),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": "took too long"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        print(done.stderr[-3000:], file=sys.stderr)
        return {"error": lines[-1][:200] if lines else f"exit code {done.returncode}"}
    notes = [line for line in done.stderr.splitlines() if line.startswith(OPENING)]
    return {**json.loads(done.stdout), "notes": notes}


OPENING = ("attention", "loss", "compiled", "memory", "product")


def merge(files: list[Path]) -> dict:
    """Merges the rows of several files of results; the later one wins."""
    each = [json.loads(file.read_text()) for file in files]
    found = {(row["run"], row["contestant"]): row for some in each for row in some["rows"]}
    versions = {name: number for some in each for name, number in some["versions"].items()}
    order = [(str(row), row.contestant) for rows in ROWS.values() for row in rows]
    return {**each[-1], "versions": versions, "rows": [found[key] for key in order if key in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", nargs="?", type=Path, help="of .q files; the demo's, 16 times")
    parser.add_argument("--only", choices=ROWS, default="qloop", help="tiny: to try this script")
    parser.add_argument("--match", default="", help="only runs whose name has this")
    parser.add_argument("--merge", nargs="+", type=Path, help="only merge these into gpu.json")
    options = parser.parse_args()
    if options.merge:
        save("gpu", merge(options.merge))
        return
    started, rows = time.monotonic(), []
    output = Path(os.environ.get("OUT", "."))
    has_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="qloop-gpu-") as folder:
        corpus = options.corpus.resolve() if options.corpus else write_corpus(Path(folder))
        for row in [row for row in ROWS[options.only] if options.match in str(row)]:
            left = SECONDS - (time.monotonic() - started)
            found = run(row, Path(folder), corpus, left)
            rows.append({"run": str(row), **row._asdict(), **found})
            print(json.dumps(rows[-1]), f"after {time.monotonic() - started:.0f} s", flush=True)
            results = {
                "device": torch.cuda.get_device_name(0) if has_gpu else "no GPU",
                "date": date.today().isoformat(),
                "corpus": f"documents of {options.corpus.name if options.corpus else 'the demo'}",
                "versions": {name: version(name) for name in CHOSEN if is_installed(name)},
                "rows": rows,
            }
            (output / f"gpu-{options.only}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{format_gpu(results)}")


if __name__ == "__main__":
    main()
