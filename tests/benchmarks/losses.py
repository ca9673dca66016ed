"""Every kind of loss beside the one that a GPU takes: time and memory of one micro-batch's head.

python tests/benchmarks/losses.py [--tokens 16384] [--hidden 1536] [--vocabulary 151936]

A trained head in fp32, then a frozen one in bf16; forward and backward, the median of five. Memory
is the most beside weights and hidden states, the gradients among it. On a CPU, which tries the
script, give smaller sizes.
"""

import argparse
import statistics
import time

import torch

from qloop.errors import ConfigError
from qloop.model.loss import _count_rows, _sum_of_linear, choose_kind

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
KINDS = ("fused", "chunked", "logits", "torch", "liger")


def wait() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def sum_of_logits(head: torch.nn.Linear, labels: torch.Tensor, hidden: torch.Tensor):
    logits = head(hidden)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def measure(kind: str, head: torch.nn.Linear, hidden: torch.Tensor) -> tuple[float, int]:
    """Seconds and bytes of a forward and backward pass."""
    vocabulary = head.out_features
    labels = torch.randint(vocabulary, (len(hidden),), device=DEVICE)
    rows = _count_rows(vocabulary, DEVICE.type, is_fused=kind == "fused")
    seconds = []
    for number in range(7):
        head.weight.grad = hidden.grad = None
        if number == 2 and HAS_GPU:  # compiled, and the library's kernels chosen
            torch.cuda.reset_peak_memory_stats()
        wait()
        started = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, HAS_GPU, cache_enabled=False):
            if kind == "logits":
                loss = sum_of_logits(head, labels, hidden)
            else:
                loss = _sum_of_linear(kind, head, labels, rows, hidden)
        (loss / len(hidden)).backward()
        wait()
        seconds.append(time.perf_counter() - started)
    weights = sum(t.nbytes for t in (head.weight, hidden))
    peak = torch.cuda.max_memory_allocated() - weights if HAS_GPU else 0
    return statistics.median(seconds[2:]), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if HAS_GPU else "CPU"
    print(f"{device}, torch {torch.__version__}; {vars(options)}\n")
    print("| head | loss | ms | fused, times | memory |\n|---|---|---|---|---|")
    for is_trained in (True, False):
        dtype = torch.bfloat16 if HAS_GPU else torch.float32
        head = torch.nn.Linear(options.hidden, options.vocabulary, bias=False, device=DEVICE)
        head = (head if is_trained else head.to(dtype)).requires_grad_(is_trained)
        hidden = torch.randn(options.tokens, options.hidden, device=DEVICE, dtype=dtype)
        fused, name = None, "trained" if is_trained else "frozen"
        for kind in KINDS:
            try:
                choose_kind(kind, DEVICE.type, 0)
                seconds, peak = measure(kind, head, hidden.requires_grad_())
            except (ConfigError, RuntimeError) as error:
                print(f"| {name} | {kind} | {str(error).splitlines()[0]} | | |")
                continue
            fused = fused or seconds
            print(f"| {name} | {kind} | {seconds * 1e3:.1f} | {seconds / fused:.2f} "
                  f"| {peak / 1e9:.2f} GB |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
