"""Trains Qwen2.5's sizes from random weights on one GPU, row by row; gpu.sh starts it.

A row that fails, or that no time is left for, is a row that says so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from contestants import Setup
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "qloop/demo"
SECONDS = 460
"""For all rows together."""

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
        extra = "".join(f", {key} {value}" for key, value in self.flags)
        return f"{self.size} {self.method}, {self.batch_size} x {self.length}{extra}"


# As a run of real length compiles by itself; qlora's layers do not.
COMPILED = (("compile", "true"),)
ROWS = {
    "qloop": [
        Row("1.5B", "full", 8, 2048, flags=COMPILED),
        Row("7B", "lora", 4, 2048, flags=COMPILED),
        Row("7B", "qlora", 4, 2048),
        Row("0.5B", "full", 4, 2048, flags=COMPILED),
        Row("7B", "full", 1, 2048),
        Row("1.5B", "full", 4, 4096, flags=COMPILED),
        Row("7B", "lora", 2, 4096, flags=COMPILED),
        Row("7B", "qlora", 2, 4096),
        Row("7B", "full", 4, 2048, flags=(("optimizer", "adamw_8bit"),)),
        Row("7B", "qlora", 1, 2048, flags=(("gradient_checkpointing", "full"),)),
    ],
    "peers": [
        Row(size, method, batch_size, 2048, contestant)
        for size, method, best_batch in (("1.5B", "full", 8), ("7B", "lora", 4))
        for contestant, batch_size in (
            ("TRL at its best", best_batch),
            ("TRL as the reference has it", 1),
        )
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
    from qloop.config import ModelConfig
    from qloop.model.shapes import build_shapes

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
    from qloop.config import LoraConfig

    shapes = build_shapes(ModelConfig(model_name=str(base)), LoraConfig(), "bf16")
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
        warmup_steps=2,
        steps=3,
        precision="bf16" if torch.cuda.is_available() else "fp32",
        folder=tempfile.mkdtemp(dir=folder),
        qloop_flags=dict(row.flags),
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


def format_rows(rows: list[tuple[Row, dict]]) -> str:
    lines = [
        "| run | by | targets a second | MFU | peak memory | planned |",
        "|---|---|---|---|---|---|",
    ]
    for row, found in rows:
        if "error" in found:
            lines.append(f"| {row} | {row.contestant} | {found['error']} | | | |")
            continue
        planned, peak = found["planned_bytes"], found["peak_bytes"]
        shown = f"{planned / 1e9:.1f} GB ({planned / peak - 1:+.0%})" if planned else ""
        lines.append(
            f"| {row} | {row.contestant} | {found['targets_per_second']:,.0f} "
            f"| {found['flops_per_second'] / found['matmul_flops']:.0%} | {peak / 1e9:.1f} GB "
            f"| {shown} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", nargs="?", type=Path, help="of .q files; the demo's, 16 times")
    parser.add_argument("--only", choices=ROWS, default="qloop", help="tiny: to try this script")
    options = parser.parse_args()
    started, rows = time.monotonic(), []
    output = Path(os.environ.get("OUT", "."))
    with tempfile.TemporaryDirectory(prefix="qloop-gpu-") as folder:
        corpus = options.corpus.resolve() if options.corpus else write_corpus(Path(folder))
        for row in ROWS[options.only]:
            left = SECONDS - (time.monotonic() - started)
            found = run(row, Path(folder), corpus, left)
            rows.append((row, found))
            print(f"{row} by {row.contestant}: {json.dumps(found)}", flush=True)
            (output / "gpu.md").write_text(format_rows(rows))
            content = [{**row._asdict(), **found} for row, found in rows]
            (output / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    print(f"\n{device}, torch {torch.__version__}\n\n{format_rows(rows)}")


if __name__ == "__main__":
    main()
