"""The loss: a sum over targets, in nats, to be divided by the targets of the whole step.

Logits are the largest tensor of a small model: for 8192 tokens and a vocabulary of 152,064 they
take 5 GB in float32, and their gradient as much again. So the head returns the loss instead of
logits: it computes the sum over targets in chunks of rows, together with the gradients. No chunk's
logits are kept, and a plain linear head computes none twice.

    kind      how                                                          heads
    logits    all logits at once, torch's cross-entropy: the reference     all
    chunked   a chunk of rows at a time                                    all
    fused     as chunked; softmax and its gradient by a compiled kernel    plain linear layers

`auto` takes `fused` on a GPU; `python tests/benchmarks/losses.py` compares the kinds, and other
libraries' kernels.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qloop.data.batches import IGNORED, MicroBatch
from qloop.errors import ConfigError
from qloop.model.attention import attention_inputs
from qloop.model.linear_loss import fused_grad_logits, sum_linear_loss

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26, "fused": 2**28}
"""Logits in a chunk: on a CPU about what its cache holds, on a GPU enough to keep it busy. Fused,
which needs one copy of them, four times as many: each chunk reads and writes the weight's gradient.
"""

SMALL_LOGITS_BYTES = 2**28
"""Below this, a GPU is faster with all logits at once."""


class Prediction(NamedTuple):
    """A model's predictions of a micro-batch's targets; float64 scalars on the model's device."""

    loss_sum: Tensor
    """Nats, summed over targets."""
    correct: Tensor
    """Targets that were the likeliest token."""


def choose(wanted: str, *, device_type: str, logits_bytes: int, may_compile: bool) -> str:
    """Chooses the kind of loss, from the bytes of a micro-batch's logits in float32."""
    if wanted != "auto":
        return wanted
    if device_type == "cpu":
        return "chunked"
    if logits_bytes < SMALL_LOGITS_BYTES:
        return "logits"
    return "fused" if may_compile and device_type == "cuda" else "chunked"


def build_target_loss(
    model: Any, kind: str, *, is_wanted: bool, device: torch.device, precision: str
) -> "TargetLoss":
    """Tries a chosen kind of loss on the model, and falls back to others unless it is wanted.

    Some models change their logits after the head (a cap, a scale), which a loss inside the head
    would miss silently. So the loss of a few tokens is compared with that of all logits.
    The model is unwrapped and on the device.

    Raises:
        ConfigError: The wanted kind fails, or computes another loss.
    """
    reasons: list[str] = []
    for candidate in [kind] if is_wanted else dict.fromkeys([kind, "chunked", "logits"]):
        reason = _why_not(model, candidate, device, precision)
        if reason is None:
            return TargetLoss(model, candidate, reason="; ".join(reasons))
        reasons.append(f"{candidate} does not fit this model: {reason}")
    raise ConfigError(f"loss: {reasons[0]}; use auto or logits")


class TargetLoss:
    """The loss of a model, in one of its kinds."""

    def __init__(
        self, model: Any, kind: str, device_type: str | None = None, reason: str = ""
    ) -> None:
        """Takes an unwrapped model and a kind without trying it; see `build_target_loss`.

        `device_type` sets the size of the chunks (None: the model's); `reason` is the reason for
        not using a faster kind.
        """
        self.kind, self.reason = kind, reason
        self._device_type = device_type or model.device.type
        self._unwrapped = model
        self._vocabulary_size = int(model.config.get_text_config().vocab_size)
        self._head: Any = None if kind == "logits" else model.get_output_embeddings()

    def sum(self, model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Sums the cross-entropy over a micro-batch's targets, in nats: a float32 scalar."""
        labels, head = micro_batch.labels.flatten(), self._head
        if head is None:
            return _sum_loss(_run(model, self._unwrapped, micro_batch).flatten(0, 1), labels)
        is_fused = self.kind == "fused" and _is_plain(head)
        rows = self._count_rows(is_fused)
        compute: Callable[[Tensor], Tensor] = functools.partial(
            sum_linear_loss, head, labels, num_rows=rows, is_fused=is_fused
        )
        if not _is_plain(head):
            compute = functools.partial(_sum_chunks, _sum_loss, head.forward, labels, rows)
        with head_computes(head, compute):
            return _run(model, self._unwrapped, micro_batch)[0, 0, 0]

    def predict(self, model: torch.nn.Module, micro_batch: MicroBatch) -> Prediction:
        """Sums the loss and the correct predictions over a micro-batch's targets; no gradients."""
        labels, head = micro_batch.labels.flatten(), self._head
        if head is None:
            logits = _run(model, self._unwrapped, micro_batch).flatten(0, 1)
            return Prediction(*_score(logits, labels))
        rows = self._count_rows()
        compute = functools.partial(_sum_chunks, _score, head.forward, labels, rows)
        with head_computes(head, compute):
            return Prediction(*_run(model, self._unwrapped, micro_batch)[0, 0])

    def compile(self, dtype: torch.dtype) -> None:
        """Compiles the kernel of `fused` for training's chunk size and logits of a type."""
        rows, device = self._count_rows(is_fused=True), self._unwrapped.device
        logits = torch.zeros(rows, self._vocabulary_size, dtype=dtype, device=device)
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        with torch.no_grad():  # as in LinearTargetLoss.forward; otherwise it would compile again
            fused_grad_logits(logits, ids, ids == IGNORED)

    def _count_rows(self, is_fused: bool = False) -> int:
        return count_rows(self._vocabulary_size, self._device_type, is_fused)


@contextlib.contextmanager
def head_computes(head: Any, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces the `forward` of a model's head: it computes numbers instead of logits.

    `compute` takes hidden states, [tokens, hidden size]; the model returns its numbers as logits,
    [1, 1, numbers]. The loss needs the head's weight, which FSDP2 gathers only while the head runs.
    """
    before = vars(head).get("forward")
    # A copy, since FSDP2 puts a hook on a head's output and cannot on a view.
    head.forward = lambda hidden: compute(hidden.flatten(0, -2)).reshape(1, 1, -1).clone()
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def compute_logits(model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Runs the model. [batch, sequence, vocabulary], float32."""
    return _run(model, model, micro_batch).float()


def count_rows(vocabulary_size: int, device_type: str, is_fused: bool = False) -> int:
    """Returns the tokens in a chunk of logits."""
    place = "fused" if is_fused and device_type != "cpu" else device_type
    return max(64, CHUNK_ELEMENTS.get(place, CHUNK_ELEMENTS["cuda"]) // vocabulary_size)


def _why_not(model: Any, kind: str, device: torch.device, precision: str) -> str | None:
    """Returns why a kind does not work for a model; None if it does."""
    if kind == "logits":
        return None
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        return "it does not say which layer is its head"
    if kind == "fused" and not _is_plain(head):
        return "its head is no plain linear layer"
    ids = torch.arange(24)[None] % model.config.get_text_config().vocab_size
    row = MicroBatch(ids, ids.roll(-1), torch.arange(24)[None]).to(device)
    reference, candidate = TargetLoss(model, "logits"), TargetLoss(model, kind)
    uses_bf16, was_training = precision == "bf16", model.training
    model.eval()
    try:
        if kind == "fused":
            candidate.compile(torch.bfloat16 if uses_bf16 else torch.float32)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
            expected = float(reference.sum(model, row))
            got = float(candidate.sum(model, row))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: no compiler, no kernel for this GPU
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    finally:
        model.train(was_training)
    if abs(got - expected) <= (2e-2 if uses_bf16 else 1e-4) * abs(expected):  # so that NaN fails
        return None
    return f"its loss is {got:.6g}, from all logits {expected:.6g}"


def _is_plain(head: torch.nn.Module) -> bool:
    """Whether a head is a linear layer with neither 4 bits nor adapters."""
    return type(head).forward is torch.nn.Linear.forward


def _run(model: torch.nn.Module, unwrapped: Any, micro_batch: MicroBatch) -> Tensor:
    """Runs the model with no cache and no mask: with either, packed documents see each other."""
    logits: Tensor = model(
        input_ids=micro_batch.input_ids,
        position_ids=micro_batch.position_ids,
        use_cache=False,
        **attention_inputs(unwrapped, micro_batch),
    ).logits
    return logits


def _sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels are shifted already: that of a position is the next token of its document."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def _sum_chunks(
    score: Callable[[Tensor, Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    num_rows: int,
    hidden: Tensor,
) -> Tensor:
    """Sums a score under any head; a backward pass computes each chunk's logits again."""

    def score_chunk(states: Tensor, targets: Tensor) -> Tensor:
        return score(head(states), targets)

    chunks = zip(torch.split(hidden, num_rows), torch.split(labels, num_rows), strict=True)
    return torch.stack([checkpoint(score_chunk, *c, use_reentrant=False) for c in chunks]).sum(0)


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums the loss and the correct predictions, in float64. [2]."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    # IGNORED is no token id, so it never counts as correct.
    correct = (logits.argmax(dim=-1) == labels).sum()
    return torch.stack([losses.double().sum(), correct.double()])
