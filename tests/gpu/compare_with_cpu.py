"""On a GPU: compares 50 steps of each method with the CPU's first steps.

    python tests/gpu/compare_with_cpu.py [--steps 50] [--cpu_steps 3] [--hidden_size 896] [--out
    DIR]

The model has the shape of Qwen2.5-0.5B, random weights and the vocabulary of the embedded
tokenizer, so that it needs no hub and can train on the embedded corpus. The GPU runs in bf16
(`precision = "auto"`), the CPU in fp32, from the same weights on the same blocks: the first losses
must agree to about 1e-2. Without a GPU it compares the CPU with itself, only to try the script.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "qloop/demo/tokenizer"


def build_base(folder: Path, hidden_size: int) -> None:
    """Writes a model with Qwen2.5-0.5B's layers, heads and widths, with random weights."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=8192,
        hidden_size=hidden_size,
        intermediate_size=4864 * hidden_size // 896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_theta=1_000_000.0,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def run(base: Path, out: Path, method: str, steps: int, length: int, on_gpu: bool) -> list[dict]:
    """Trains and returns the lines of metrics.jsonl."""
    name = f"{method}-{'gpu' if on_gpu else 'cpu'}"
    learning_rate = "1e-4" if method == "full" else "1e-3"
    command = [
        *(sys.executable, "-m", "qloop", "train", "--model_name", str(base)),
        *("--train_file", str(ROOT / "qloop/demo/corpus"), "--output_dir", str(out)),
        *("--experiment_name", name, "--training_method", method, "--max_seq_length", str(length)),
        *("--batch_size", "2", "--gradient_accumulation_steps", "2", "--warmup_steps", "5"),
        *("--learning_rate", learning_rate, "--max_steps", str(steps), "--eval_steps", "0"),
        *("--save_steps", str(steps), "--num_samples", "0", "--held_out_share", "0.1"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = (out / name / "logs/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cpu_steps", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=896)
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp())
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else "no GPU, so the CPU is used"
    print(f"{device}; torch {torch.__version__}, transformers {transformers.__version__}")
    base = out / "base"
    build_base(base, arguments.hidden_size)
    rows = []
    for method in ("full", "lora", "qlora"):
        length = arguments.max_seq_length
        gpu = run(base, out, method, arguments.steps, length, on_gpu=has_gpu)
        # More steps than the warm-up has; during it both have the same learning rates.
        last_step = max(arguments.cpu_steps, 6)
        cpu = run(base, out / "cpu", method, last_step, length, on_gpu=False)
        first = [f"{g['loss']:.4f} / {c['loss']:.4f}" for g, c in zip(gpu, cpu, strict=False)][
            : arguments.cpu_steps
        ]
        difference = max(
            abs(g["loss"] - c["loss"])
            for g, c in list(zip(gpu, cpu, strict=False))[: arguments.cpu_steps]
        )
        speed = sorted(record["tokens_per_second"] for record in gpu[5:])
        rows.append(
            f"| {method} | {', '.join(first)} | {difference:.1e} | {gpu[-1]['loss']:.4f} "
            f"| {speed[len(speed) // 2]:,.0f} | {gpu[-1]['peak_memory_bytes'] / 2**30:.1f} |"
        )
    print("| method | first losses, GPU / CPU | largest difference | loss at the end "
          "| targets/s, median | peak GiB |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
