"""Compares the kinds of loss with other libraries' kernels, in time and memory of one head.

python tests/benchmarks/losses.py [--tokens 16384] [--hidden 1536] [--vocabulary 151936]

A trained head in fp32, then a frozen one in bf16; forward and backward, the median of five. `torch`
is its linear_cross_entropy, from version 2.13 on; `liger` is the Triton kernel of liger-kernel.
Memory is the peak without weights and hidden states, and includes the gradients. On a GPU the
figures update losses.json and RESULTS.md. A CPU only tries the script; give it smaller sizes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from render import format_losses, save

from qloop.data.batches import IGNORED
from qloop.model.linear_loss import sum_linear_loss
from qloop.model.loss import count_rows

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def sum_of_ours(
    head: torch.nn.Linear, labels: torch.Tensor, hidden: torch.Tensor, *, is_fused: bool
) -> torch.Tensor:
    rows = count_rows(head.out_features, DEVICE.type, is_fused)
    return sum_linear_loss(head, labels, hidden, num_rows=rows, is_fused=is_fused)


def sum_of_logits(head: torch.nn.Linear, labels: torch.Tensor, hidden: torch.Tensor):
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


def sum_by_torch(head: torch.nn.Linear, labels: torch.Tensor, hidden: torch.Tensor):
    # "balanced" sums the weight's gradient over chunks in fp32, as qloop does.
    options = torch.nn.LinearCrossEntropyOptions(acc_policy="balanced")
    weight = head.weight.to(hidden.dtype)
    with torch.autocast(DEVICE.type, enabled=False):
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def sum_by_liger(head: torch.nn.Linear, labels: torch.Tensor, hidden: torch.Tensor):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
    )
    with torch.autocast(DEVICE.type, enabled=False):
        return loss(head.weight.to(hidden.dtype), hidden, labels)


KINDS: dict[str, Callable[..., torch.Tensor]] = {
    "fused": lambda *values: sum_of_ours(*values, is_fused=True),
    "chunked": lambda *values: sum_of_ours(*values, is_fused=False),
    "logits": sum_of_logits,
    "torch": sum_by_torch,
    "liger": sum_by_liger,
}


def wait() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


def measure(kind: str, head: torch.nn.Linear, hidden: torch.Tensor) -> tuple[float, int, float]:
    """Seconds and peak bytes of a forward and backward pass, and the mean loss."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    labels = torch.randint(head.out_features, (len(hidden),), device=DEVICE, generator=generator)
    seconds = []
    for number in range(7):
        head.weight.grad = hidden.grad = None
        if number == 2 and HAS_GPU:  # compiled, and the library's kernels chosen
            torch.cuda.reset_peak_memory_stats()
        wait()
        started = time.perf_counter()
        with torch.autocast(DEVICE.type, torch.bfloat16, HAS_GPU, cache_enabled=False):
            loss = KINDS[kind](head, labels, hidden) / len(hidden)
        loss.backward()
        wait()
        seconds.append(time.perf_counter() - started)
    weights = sum(t.nbytes for t in (head.weight, hidden))
    peak = torch.cuda.max_memory_allocated() - weights if HAS_GPU else 0
    return statistics.median(seconds[2:]), peak, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict] = []
    for is_trained in (True, False):
        dtype = torch.bfloat16 if HAS_GPU else torch.float32
        head = torch.nn.Linear(options.hidden, options.vocabulary, bias=False, device=DEVICE)
        head = (head if is_trained else head.to(dtype)).requires_grad_(is_trained)
        hidden = torch.randn(options.tokens, options.hidden, device=DEVICE, dtype=dtype)
        for kind in KINDS:
            rows.append({"head": "trained" if is_trained else "frozen", "loss": kind})
            try:
                seconds, peak, loss = measure(kind, head, hidden.requires_grad_())
            except (AttributeError, ImportError, RuntimeError) as error:
                rows[-1]["error"] = str(error).splitlines()[0]
            else:
                rows[-1].update(loss_sum=loss, milliseconds=seconds * 1e3, memory_gb=peak / 1e9)
            print(rows[-1], flush=True)
    results = {
        "device": torch.cuda.get_device_name() if HAS_GPU else "CPU",
        "versions": {"torch": torch.__version__},
        "setup": vars(options),
        "rows": rows,
    }
    print(f"\n{format_losses(results)}")
    if HAS_GPU:
        save("losses", results)


if __name__ == "__main__":
    main()
