"""Attention over packed documents without a mask: each query sees only its own document.

One small tensor, `boundaries`, says where documents start: offsets into the flattened batch, from 0
to its size. For a row with documents of 3 and 5 tokens, then a row with one of 8:

    boundaries  0 3 8 16

Every layer receives it under the argument names of transformers' own packed kernels. On a GPU it is
read by torch's `varlen_attn` (flash attention, bf16 only); on a CPU each document is one call of a
kernel. Both are operators to `torch.compile`, which sees a tensor and not its values, so a new
layout of documents compiles nothing. The work grows with the square of the documents' lengths, not
of the block's.
"""

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from qloop.data.batches import MicroBatch
from qloop.errors import ConfigError

DOCUMENTS = "documents"
"""The name of this attention in transformers and in the config."""

_CHANGING = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Arguments of some models that change the result of attention; not supported here."""

# Newer versions of torch need a flag if there are fewer key heads than query heads.
_NEEDS_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters
_FEWER_KEYS: dict[str, Any] = {"enable_gqa": True} if _NEEDS_FLAG else {}


class AttentionChoice(NamedTuple):
    """An implementation of attention."""

    name: str
    """DOCUMENTS, or transformers' name of one of its own."""
    reason: str = ""
    """Why `auto` did not take DOCUMENTS."""


def choose(
    wanted: str, model: PreTrainedModel, *, device_type: str, precision: str
) -> AttentionChoice:
    """Chooses the attention of a run, from the model's config alone.

    Raises:
        ConfigError: The config asks for `documents`, which the model or device rules out.
    """
    if wanted not in ("auto", DOCUMENTS):
        return AttentionChoice(wanted)
    reason = _why_not_documents(model, device_type, precision)
    if reason is None:
        return AttentionChoice(DOCUMENTS)
    if wanted == DOCUMENTS:
        raise ConfigError(f"attention: documents cannot be used here: {reason}; use auto")
    return AttentionChoice(model.config._attn_implementation, reason)


def _why_not_documents(model: PreTrainedModel, device_type: str, precision: str) -> str | None:
    config = model.config.get_text_config()
    if device_type not in ("cpu", "cuda"):
        return f"it has no kernel for {device_type}"
    if device_type == "cuda" and precision != "bf16":
        return "on a GPU it computes in bf16 only"
    if dropout := getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return f"the model drops attention weights ({dropout})"
    if getattr(config, "attn_logit_softcapping", None):
        return f"the model caps attention scores (softcap {config.attn_logit_softcapping:g})"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{model.config.model_type} takes no attention but its own"
    return None


def attention_inputs(model: Any, micro_batch: MicroBatch) -> dict[str, Any]:
    """Returns the keyword arguments that mark document boundaries; empty if a kernel takes none."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if not implementation.startswith((DOCUMENTS, "flash_attention")):
        return {}
    # The block's length, not the longest document's: a new number would compile the layers again.
    length, boundaries = micro_batch.input_ids.shape[1], micro_batch.boundaries
    lengths = {"max_length_q": length, "max_length_k": length}
    return {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, **lengths}


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Uses transformers' own attention, which supports caches and masks, until the block ends."""
    if getattr(model.config, "_attn_implementation", None) != DOCUMENTS:
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(DOCUMENTS)


def attend_to_documents(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of one layer; the interface is `transformers.AttentionInterface`.

    Args:
        module: The layer.
        query: [batch, heads, sequence, head size].
        key: [batch, key heads, sequence, head size].
        value: As key.
        attention_mask: Must be None.
        scaling: Factor of the scores; 1 / sqrt(head size) if None.
        dropout: Must be 0.
        sliding_window: Tokens that a token sees, itself included; None: its whole document.
        cu_seq_lens_q: The boundaries, int32.
        max_length_q: At least the longest document's length.
        others: Ignored, but for those in `_CHANGING`.

    Returns:
        [batch, sequence, heads, head size], and no weights.

    Raises:
        ValueError: The layer passes an unsupported argument.
    """
    given = [name for name in _CHANGING if others.get(name) is not None]
    if attention_mask is not None or dropout or given or cu_seq_lens_q is None:
        raise ValueError(
            f"attention over documents supports no mask, no dropout and no {' '.join(given)}"
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    if query.device.type == "cpu":
        return attend(query, key, value, cu_seq_lens_q, scale, window)[0], None
    inputs = [query, key, value]
    return _attend_by_torch(inputs, cu_seq_lens_q, max_length_q, scale, window), None


def _attend_by_torch(
    inputs: list[Tensor], boundaries: Tensor, max_length: int, scale: float, window: int
) -> Tensor:
    """Calls `varlen_attn`, which takes the rows concatenated; that is a view, not a copy."""
    batch, _, length, _ = inputs[0].shape
    flat: list[Any] = [tensor.transpose(1, 2).flatten(0, 1) for tensor in inputs]
    where: Any = (boundaries, boundaries, max_length, max_length)
    # Its window counts the tokens before the current one, -1 for all; the 0 after it means causal.
    options: Any = {"scale": scale, "window_size": (window - 1, 0), **_FEWER_KEYS}
    attended: Any = varlen_attn(*flat, *where, **options)
    result: Tensor = attended.unflatten(0, (batch, length))
    return result


@torch.library.custom_op("qloop::attend", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Computes attention within each document on a CPU.

    Returns:
        The result, [batch, sequence, heads, head size], and the log of each query's sum of
        exponentials, float32, [batch, heads, sequence].
    """
    batch, heads, length, size = query.shape
    attended = query.new_empty(batch, length, heads, size)
    log_sums = query.new_empty(batch, heads, length, dtype=torch.float32)
    for row, here in _documents(boundaries, length):
        grouped = _grouped(query, key, value, row, here)
        mask = _window_mask(here.stop - here.start, window, query.dtype)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *grouped, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        attended[row, here] = out.flatten(0, 1).transpose(0, 1)
        log_sums[row, :, here] = sums.flatten(0, 1)
    return attended, log_sums


@torch.library.custom_op("qloop::attend_backward", mutates_args=())
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    log_sums: Tensor,
    boundaries: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key and value."""
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query, key, value))
    groups, size = (key.shape[1], query.shape[1] // key.shape[1]), query.shape[3]
    for row, here in _documents(boundaries, query.shape[2]):
        grouped = _grouped(query, key, value, row, here)
        mask = _window_mask(here.stop - here.start, window, query.dtype)
        given, out = (
            t[row, here].transpose(0, 1).reshape(*groups, -1, size) for t in (gradient, attended)
        )
        sums = log_sums[row, :, here].reshape(*groups, -1)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            given, *grouped, out, sums, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        grad_query[row, :, here] = grads[0].flatten(0, 1)
        grad_key[row, :, here] = grads[1].sum(1)  # over the queries that share a key
        grad_value[row, :, here] = grads[2].sum(1)
    return grad_query, grad_key, grad_value


@attend.register_fake
def _attend_shapes(query: Any, *others: Any) -> Any:
    batch, heads, length, size = query.shape
    attended = query.new_empty(batch, length, heads, size)
    return attended, query.new_empty(batch, heads, length, dtype=torch.float32)


@attend_backward.register_fake
def _attend_backward_shapes(gradient: Any, query: Any, key: Any, value: Any, *others: Any) -> Any:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, boundaries, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries)


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> Any:
    gradients = attend_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.window)
    return (*gradients, None, None, None)


attend.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _documents(boundaries: Tensor, length: int) -> Iterator[tuple[int, slice]]:
    """Yields the row of each document and its columns; no document crosses the end of a row."""
    for begin, end in itertools.pairwise(boundaries.tolist()):
        row, column = divmod(begin, length)
        yield row, slice(column, column + end - begin)


def _grouped(query: Tensor, key: Tensor, value: Tensor, row: int, here: slice) -> list[Tensor]:
    """Returns one document's [key heads, queries per key, tokens, head size]; copies no key."""
    shared = query.shape[1] // key.shape[1]
    queries = query[row, :, here].reshape(key.shape[1], shared, -1, query.shape[3])
    return [queries, *(t[row, :, None, here].expand(-1, shared, -1, -1) for t in (key, value))]


def _window_mask(length: int, window: int, dtype: torch.dtype) -> Tensor | None:
    """Returns a mask to add to the scores; None for a document no longer than the window."""
    if not 0 < window < length:
        return None
    places = torch.arange(length)
    behind = places[:, None] - places
    hidden = (behind < 0) | (behind >= window)
    return torch.zeros(length, length, dtype=dtype).masked_fill_(hidden, -torch.inf)


# Not registered with transformers' masks: without an entry it builds none, and reads no tensor.
AttentionInterface.register(DOCUMENTS, attend_to_documents)
