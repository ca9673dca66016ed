"""The loss: a sum over targets, in nats, to be divided by the targets of the whole step.

Logits are the largest tensor of a small model: 8192 tokens of a vocabulary of 152,064 are 5 GB in
float32, and as much again for their gradient. So the output layer is asked for the loss and not for
logits: while the model runs, its head gives the sum over targets, worked out some rows at a time,
together with the gradients, so that no row's logits are kept or computed twice.

    kind      how                                                        heads
    logits    all logits, torch's cross-entropy: the reference           all
    chunked   some rows at a time, here                                  all
    fused     the same, softmax and slopes by one compiled kernel        plain linear layers
    torch     torch.nn.functional.linear_cross_entropy, from torch 2.13  plain linear layers
    liger     the Triton kernel of liger-kernel, on a GPU                plain linear layers

`fused` is what a GPU takes: `python tests/benchmarks/losses.py` has them beside each other.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from qloop.data.batches import IGNORED, MicroBatch
from qloop.errors import ConfigError
from qloop.model.attention import attention_inputs
from qloop.model.linear_loss import LinearTargetLoss, fused_slopes, softmax_slopes

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26, "fused": 2**28}
"""Logits at a time: on a CPU what its cache nearly holds, on a GPU what keeps it busy; four times
as many where there is one copy of them, since each chunk reads and writes the weight's gradient."""

SMALL_LOGITS_BYTES = 2**28
"""Below this a GPU is faster with all logits at once."""


class Prediction(NamedTuple):
    """What a model made of a micro-batch; scalars on the model's device."""

    loss_sum: torch.Tensor
    """Nats, summed over targets."""
    correct: torch.Tensor
    """Targets that were the likeliest token."""


def compute_logits(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Runs the model. [batch, sequence, vocabulary], float32.

    No cache and no mask: with either, transformers stops telling packed documents apart.
    """
    return _run(model, model, micro_batch).float()


def next_token_loss(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Sums the cross-entropy over a micro-batch's targets, in nats: the reference.

    Labels are shifted already: position i's label is the token after it in its document.
    """
    return _sum_of_logits(compute_logits(model, micro_batch), micro_batch.labels)


def predict(model: torch.nn.Module, micro_batch: MicroBatch) -> Prediction:
    """Sums loss and right answers over a micro-batch's targets, in float64: the reference."""
    logits = compute_logits(model, micro_batch).flatten(0, 1)
    return Prediction(*_score(logits, micro_batch.labels.flatten()))


class TargetLoss:
    """The loss of a model, in one of its kinds."""

    def __init__(
        self, model: Any, kind: str, device_type: str | None = None, reason: str = ""
    ) -> None:
        """Takes the model without wrappers; see `choose_loss`.

        Chunks are those of a device, the model's own if none is given.
        """
        self.kind = kind
        self.reason = reason
        """Why it is not another kind that would be faster."""
        self._device_type = device_type or model.device.type
        self._plain = model
        self._vocabulary_size = int(model.config.get_text_config().vocab_size)
        self._head: Any = None if kind == "logits" else model.get_output_embeddings()

    def sum(self, model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """Sums the cross-entropy over a micro-batch's targets, in nats.

        Args:
            model: As prepared, or without wrappers.
            micro_batch: On the model's device.
        """
        if self._head is None:
            return _sum_of_logits(_run(model, self._plain, micro_batch), micro_batch.labels)
        head_forward, labels = self._head.forward, micro_batch.labels.flatten()
        if _is_plain(self._head):
            num_rows = self._num_rows(is_fused=self.kind == "fused")
            at_head = functools.partial(_sum_of_linear, self.kind, self._head, labels, num_rows)
        else:
            at_head = functools.partial(_sum_of_any, head_forward, labels, self._num_rows())
        return self._run_to_head(model, micro_batch, at_head)[0]

    def compile(self, dtype: torch.dtype) -> None:
        """Makes the kernel of `fused`, for chunks of the size that training has."""
        rows, device = self._num_rows(is_fused=True), self._plain.device
        logits = torch.zeros(rows, self._vocabulary_size, dtype=dtype, device=device)
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        with torch.no_grad():  # as within the loss: else it would be made once more there
            fused_slopes(logits, ids, ids == IGNORED)

    def predict(self, model: torch.nn.Module, micro_batch: MicroBatch) -> Prediction:
        """Sums loss and right answers over a micro-batch's targets, in float64; no gradients."""
        labels = micro_batch.labels.flatten()
        if self._head is None:
            logits = _run(model, self._plain, micro_batch).flatten(0, 1)
            return Prediction(*_score(logits, labels))
        at_head = functools.partial(_score_rows, self._head.forward, labels, self._num_rows())
        return Prediction(*self._run_to_head(model, micro_batch, at_head))

    def _num_rows(self, is_fused: bool = False) -> int:
        return _count_rows(self._vocabulary_size, self._device_type, is_fused)

    def _run_to_head(
        self,
        model: torch.nn.Module,
        micro_batch: MicroBatch,
        at_head: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Runs the model with a head that gives some numbers instead of logits.

        Within the head, as there its weight is whole, whatever the engine makes of it elsewhere.
        """
        head = self._head
        before = vars(head).get("forward")
        # No view: FSDP2 hooks onto what a head gives.
        head.forward = lambda hidden: at_head(hidden.flatten(0, -2)).reshape(1, 1, -1).clone()
        try:
            return _run(model, self._plain, micro_batch)[0, 0]
        finally:
            if before is None:
                del head.forward
            else:
                head.forward = before


def choose_loss(
    model: Any,
    wanted: str,
    device: torch.device,
    tokens: int,
    precision: str,
    may_compile: bool = True,
) -> TargetLoss:
    """Chooses the kind, and tries it on the model.

    Models that change logits after the head (a cap, a scale) have to show them; no error tells, so
    a few tokens are computed both ways.

    Args:
        model: Without wrappers, on the device.
        wanted: The config's `loss`.
        device: Where it is trained.
        tokens: Of a micro-batch.
        precision: `bf16` or `fp32`.
        may_compile: Whether `auto` may take what is compiled.

    Raises:
        ConfigError: The kind that was asked for cannot be had, or gives another loss.
    """
    vocabulary_size = model.config.get_text_config().vocab_size
    kind = choose_kind(wanted, device.type, tokens * vocabulary_size * 4, may_compile)
    others = ["chunked", "logits"] if wanted == "auto" else []
    reasons: list[str] = []
    for candidate in dict.fromkeys([kind, *others]):
        reason = _why_not(model, candidate, device, precision)
        if reason is None:
            return TargetLoss(model, candidate, reason="; ".join(reasons))
        reasons.append(f"{candidate} does not fit this model: {reason}")
    raise ConfigError(f"loss: {reasons[0]}; use auto or logits")


def _why_not(model: Any, kind: str, device: torch.device, precision: str) -> str | None:
    """Says why a kind does not do for a model; None if it does."""
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
    except Exception as error:  # of many kinds: a kernel of another version, or none for this GPU
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    finally:
        model.train(was_training)
    if abs(got - expected) <= (2e-2 if uses_bf16 else 1e-4) * abs(expected):  # so that NaN fails
        return None
    return f"it gives {got:.6g} where logits give {expected:.6g}"


def choose_kind(wanted: str, device_type: str, logits_bytes: int, may_compile: bool = True) -> str:
    """Chooses how the loss is computed, before there is a model.

    Raises:
        ConfigError: The kind that was asked for cannot be had.
    """
    has = {
        "torch": hasattr(F, "linear_cross_entropy"),
        "liger": device_type == "cuda" and importlib.util.find_spec("liger_kernel") is not None,
    }
    if wanted != "auto":
        if not has.get(wanted, True):
            needs = {"torch": "torch 2.13 or newer", "liger": "a GPU and liger-kernel"}[wanted]
            raise ConfigError(f"loss: {wanted} needs {needs}; use auto")
        return wanted
    if device_type == "cpu":
        return "chunked"
    if logits_bytes < SMALL_LOGITS_BYTES:
        return "logits"
    return "fused" if may_compile and device_type == "cuda" else "chunked"


def _is_plain(head: torch.nn.Module) -> bool:
    """Whether a head is a linear layer with neither 4 bits nor adapters."""
    return type(head).forward is torch.nn.Linear.forward


def _run(model: torch.nn.Module, plain: Any, micro_batch: MicroBatch) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=micro_batch.input_ids,
        position_ids=micro_batch.position_ids,
        use_cache=False,
        **attention_inputs(plain, micro_batch),
    ).logits
    return logits


def _sum_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _score(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums loss and right answers, in float64. [2]."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    # IGNORED is no token id, so that it is never counted as right.
    correct = (logits.argmax(dim=-1) == labels).sum()
    return torch.stack([losses.double().sum(), correct.double()])


def _score_rows(
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    num_rows: int,
    hidden: torch.Tensor,
) -> torch.Tensor:
    parts = zip(torch.split(hidden, num_rows), torch.split(labels, num_rows), strict=True)
    return torch.stack([_score(head(some), targets) for some, targets in parts]).sum(dim=0)


def _sum_of_any(
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    num_rows: int,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Sums the loss under a head of any kind; its logits are computed again in the backward."""

    def sum_of_rows(some: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _sum_of_logits(head(some), targets)

    parts = zip(torch.split(hidden, num_rows), torch.split(labels, num_rows), strict=True)
    sums = [checkpoint(sum_of_rows, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()


def _sum_of_linear(
    kind: str,
    head: torch.nn.Linear,
    labels: torch.Tensor,
    num_rows: int,
    hidden: torch.Tensor,
) -> torch.Tensor:
    device = hidden.device.type
    uses_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if uses_autocast else head.weight.dtype
    with torch.autocast(device, enabled=False):
        if kind in ("chunked", "fused"):
            turn = softmax_slopes
            if kind == "fused":  # in chunks of one size: a single last row would compile anew
                turn, num_rows = fused_slopes, _divide(len(hidden), num_rows)
            loss_sum: torch.Tensor = LinearTargetLoss.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, head.bias, labels, num_rows, dtype, turn
            )
            return loss_sum
        bias = None if head.bias is None else head.bias.to(dtype)
        return _PEERS[kind](hidden.to(dtype), head.weight.to(dtype), labels, bias)


def _sum_by_torch(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    # Gradients of the weight are summed over chunks in fp32, as they are over micro-batches.
    options = torch.nn.LinearCrossEntropyOptions(acc_policy="balanced")
    return F.linear_cross_entropy(
        hidden, weight, labels, linear_bias=bias, reduction="sum", options=options
    )


def _sum_by_liger(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
    )
    loss_sum: torch.Tensor = loss(weight, hidden, labels, bias)
    return loss_sum


_PEERS = {"torch": _sum_by_torch, "liger": _sum_by_liger}


def _count_rows(vocabulary_size: int, device: str, is_fused: bool = False) -> int:
    """Says for how many tokens logits are computed at a time."""
    place = "fused" if is_fused and device != "cpu" else device
    return max(64, CHUNK_ELEMENTS.get(place, CHUNK_ELEMENTS["cuda"]) // vocabulary_size)


def _divide(total: int, limit: int) -> int:
    """Gives the size of parts that are alike but for some rows, none above a limit.

    >>> _divide(10, 4)  # 4, 4 and 2
    4
    >>> _divide(9, 4)  # 3, 3 and 3
    3
    """
    return math.ceil(total / math.ceil(total / limit))
