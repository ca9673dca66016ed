"""The loss of a linear head and its gradients at once, some rows at a time.

Of a chunk's logits nothing is kept but what they do to the gradients of hidden states and weight.
What turns logits into their gradient, softmax - 1 at the target, is one of two:

    softmax_slopes  by torch's operators: a float32 copy of the chunk
    fused_slopes    by one compiled kernel, in the memory of the logits
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from qloop.data.batches import IGNORED


class LinearTargetLoss(torch.autograd.Function):
    """The sum over targets of cross_entropy(hidden @ weight.T + bias), some rows at a time.

    The gradient of a target's logits is softmax - 1 at the target; it is turned into the gradients
    of hidden state and weight while the logits are there, and only multiplied in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        num_rows: int,
        dtype: torch.dtype,
        turn: Callable[..., Any],
    ) -> torch.Tensor:
        """Sums the loss, float32, and prepares the gradients.

        Args:
            ctx: Torch's.
            hidden: [tokens, hidden size].
            weight: [vocabulary, hidden size].
            bias: [vocabulary], or None.
            labels: [tokens], or IGNORED.
            num_rows: Tokens at a time.
            dtype: What matrices are multiplied in; sums are float32.
            turn: Turns a chunk's logits into their gradient, and sums its loss.
        """
        needs = ctx.needs_input_grad[:3]
        matrix = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        of_hidden = torch.empty_like(hidden) if needs[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        of_bias = weight.new_zeros(len(weight), dtype=torch.float32) if needs[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(hidden), num_rows):
            here = slice(first, first + num_rows)
            states, ids = hidden[here].to(dtype), labels[here, None]
            is_ignored = ids == IGNORED
            ids = ids.masked_fill(is_ignored, 0)
            slopes, loss_sum = turn(F.linear(states, matrix, offset), ids, is_ignored)
            total += loss_sum
            if not any(needs):
                continue
            # Rows without a target are taken out where they are short.
            states = states.masked_fill(is_ignored, 0.0)
            if of_bias is not None:
                of_bias += (~is_ignored).float().T[0] @ slopes.float()
            slopes = slopes.to(dtype)
            if of_hidden is not None:
                of_hidden[here] = (slopes @ matrix).masked_fill_(is_ignored, 0.0)
            if of_weight is not None:
                _add_product(of_weight, slopes.T, states)
            del slopes  # before there are the next
        ctx.gradients = (of_hidden, of_weight, of_bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:
        """Scales the gradients, in place: there is one backward pass."""
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss was differentiated twice"
        scaled = [
            None if gradient is None else gradient.mul_(slope).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds a matrix product to a sum in float32; a GPU's product is rounded to no other type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def softmax_slopes(
    logits: torch.Tensor, ids: torch.Tensor, is_ignored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the gradient of some rows' logits, float32, and the sum of their losses.

    Args:
        logits: [rows, vocabulary].
        ids: [rows, 1], the targets.
        is_ignored: [rows, 1]; such rows have no loss, and a gradient that is to be left out.
    """
    slopes = logits.float().log_softmax(dim=1)
    loss_sum = -slopes.gather(1, ids).masked_fill_(is_ignored, 0.0).sum()
    return slopes.exp_().scatter_add_(1, ids, slopes.new_full(ids.shape, -1.0)), loss_sum


def fused_slopes(
    logits: torch.Tensor, ids: torch.Tensor, is_ignored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by a compiled kernel, in the memory and the type of the logits."""
    return logits, torch.ops.qloop.turn_in_place(logits, ids, is_ignored)


# An operator, so that a simulation sees what it leaves and not how it works.
@torch.library.custom_op("qloop::turn_in_place", mutates_args=("logits",))
def _turn_in_place(
    logits: torch.Tensor, ids: torch.Tensor, is_ignored: torch.Tensor
) -> torch.Tensor:
    for tensor in (logits, ids, is_ignored):
        torch._dynamo.mark_dynamic(tensor, 0)  # the last chunk has fewer rows
    loss_sum: torch.Tensor = _compiled_turn()(logits, ids, is_ignored)
    return loss_sum


@_turn_in_place.register_fake
def _turn_in_place_shapes(logits: Any, ids: Any, is_ignored: Any) -> Any:
    return logits.new_empty((), dtype=torch.float32)


@functools.cache
def _compiled_turn() -> Callable[..., torch.Tensor]:
    import torch._dynamo  # takes seconds, and runs that do not compile do without

    return torch.compile(_turn_by_rows)


def _turn_by_rows(
    logits: torch.Tensor, ids: torch.Tensor, is_ignored: torch.Tensor
) -> torch.Tensor:
    """Written for the compiler: nothing between the logits and their gradient is kept."""
    scores = logits.float()
    log_sums = scores.logsumexp(dim=1, keepdim=True)
    losses = (log_sums - scores.gather(1, ids)).masked_fill(is_ignored, 0.0)
    is_target = torch.arange(logits.shape[1], device=logits.device) == ids
    logits.copy_((scores - log_sums).exp() - is_target.float())
    return losses.sum()
