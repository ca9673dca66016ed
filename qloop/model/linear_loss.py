"""The loss of a linear head together with its gradients, one chunk of rows at a time.

A chunk's logits live only until their gradient, softmax minus 1 at the target, has been multiplied
into the gradients of the hidden states and the weight. Two functions compute that gradient:

    softmax_grad_logits  with torch's operators, in a float32 copy of the chunk
    fused_grad_logits    with one compiled kernel, in the memory of the logits
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qloop.data.batches import IGNORED


def sum_linear_loss(
    head: torch.nn.Linear, labels: Tensor, hidden: Tensor, *, num_rows: int, is_fused: bool
) -> Tensor:
    """Sums the loss under a plain linear head, in nats: a float32 scalar.

    The head has no adapters and its weight is not sharded; products have autocast's type, if it is
    on. Labels are [tokens], IGNORED where there is no target; hidden states [tokens, hidden size].
    A chunk has at most `num_rows` tokens; if `is_fused`, a compiled kernel computes the softmax.
    """
    device = hidden.device.type
    uses_autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if uses_autocast else head.weight.dtype
    differentiate = softmax_grad_logits
    if is_fused:  # in chunks of nearly one size: a last chunk of one row would compile anew
        differentiate, num_rows = fused_grad_logits, divide_evenly(len(hidden), num_rows)
    with torch.autocast(device, enabled=False):
        loss_sum: Tensor = LinearTargetLoss.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, labels, num_rows, dtype, differentiate
        )
    return loss_sum


def divide_evenly(total: int, limit: int) -> int:
    """Returns the size of nearly equal chunks, none above a limit: 3 for 9 and a limit of 4."""
    return math.ceil(total / math.ceil(total / limit))


class LinearTargetLoss(torch.autograd.Function):
    """The sum over targets of cross_entropy(hidden @ weight.T + bias), in chunks.

    The forward pass computes the gradients too, while a chunk's logits exist.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        num_rows: int,
        dtype: torch.dtype,
        differentiate: Callable[..., Any],
    ) -> Tensor:
        """Sums the loss of hidden states, [tokens, hidden size], and prepares the gradients.

        Products have type `dtype`, sums float32. `differentiate` is one of the two functions above.
        """
        needs = ctx.needs_input_grad[:3]
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        grad_bias = weight.new_zeros(len(weight), dtype=torch.float32) if needs[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(hidden), num_rows):
            here = slice(first, first + num_rows)
            states, ids = hidden[here].to(dtype), labels[here, None]
            is_ignored = ids == IGNORED
            ids = ids.masked_fill(is_ignored, 0)
            grad_logits, loss_sum = differentiate(F.linear(states, matrix, offset), ids, is_ignored)
            total += loss_sum
            if not any(needs):
                continue
            # Rows without a target are masked here, in the narrow matrices.
            states = states.masked_fill(is_ignored, 0.0)
            if grad_bias is not None:
                grad_bias += (~is_ignored).float().T[0] @ grad_logits.float()
            grad_logits = grad_logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[here] = (grad_logits @ matrix).masked_fill_(is_ignored, 0.0)
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, states)
            del grad_logits  # before the next chunk's are allocated
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        """Scales the gradients in place; there is only one backward pass."""
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss was differentiated twice"
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a matrix product to a float32 sum; on a GPU the product is not rounded before."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def softmax_grad_logits(logits: Tensor, ids: Tensor, is_ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient of some rows' logits, in float32, and the sum of their losses.

    Args:
        logits: [rows, vocabulary].
        ids: [rows, 1], the targets.
        is_ignored: [rows, 1]; these rows add no loss, and the caller drops their gradient.
    """
    grad_logits = logits.float().log_softmax(dim=1)
    loss_sum = -grad_logits.gather(1, ids).masked_fill_(is_ignored, 0.0).sum()
    ones = grad_logits.new_full(ids.shape, -1.0)
    return grad_logits.exp_().scatter_add_(1, ids, ones), loss_sum


def fused_grad_logits(logits: Tensor, ids: Tensor, is_ignored: Tensor) -> tuple[Tensor, Tensor]:
    """As `softmax_grad_logits`, with a compiled kernel that overwrites the logits."""
    return logits, torch.ops.qloop.grad_logits_in_place(logits, ids, is_ignored)


# An operator, so that a simulation sees its results and none of its working memory.
@torch.library.custom_op("qloop::grad_logits_in_place", mutates_args=("logits",))
def _grad_logits_in_place(logits: Tensor, ids: Tensor, is_ignored: Tensor) -> Tensor:
    for tensor in (logits, ids, is_ignored):
        torch._dynamo.mark_dynamic(tensor, 0)  # the last chunk has fewer rows
    loss_sum: Tensor = _compiled_kernel()(logits, ids, is_ignored)
    return loss_sum


@_grad_logits_in_place.register_fake
def _grad_logits_in_place_shapes(logits: Any, ids: Any, is_ignored: Any) -> Any:
    return logits.new_empty((), dtype=torch.float32)


@functools.cache
def _compiled_kernel() -> Callable[..., Tensor]:
    import torch._dynamo  # takes seconds to import, which runs that do not compile save

    return torch.compile(_grad_logits_by_rows)


def _grad_logits_by_rows(logits: Tensor, ids: Tensor, is_ignored: Tensor) -> Tensor:
    """Written for the compiler: nothing between the logits and their gradient is stored."""
    scores = logits.float()
    log_sums = scores.logsumexp(dim=1, keepdim=True)
    losses = (log_sums - scores.gather(1, ids)).masked_fill(is_ignored, 0.0)
    is_target = torch.arange(logits.shape[1], device=logits.device) == ids
    logits.copy_((scores - log_sums).exp() - is_target.float())
    return losses.sum()
