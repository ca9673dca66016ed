"""What of a layer's activations is kept for the backward pass: gradient checkpointing, by layer.

    off        all that the backward pass asks for
    selective  what large matrix products and attention gave; the cheap rest is computed again
    full       a layer's input; the whole layer is computed again

With `offload`, the inputs that `full` keeps wait in host memory. The numbers are the same under
all of them, and the same random numbers are drawn again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from qloop.errors import ConfigError

_KEPT = frozenset(
    {
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "bitsandbytes::gemm_4bit"),
        *("qloop::attend", "torch_attn::_varlen_attn", "aten::_flash_attention_forward"),
        *("aten::_scaled_dot_product_flash_attention", "flash_attn::_flash_attn_varlen_forward"),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    }
)
"""Operators whose results `selective` keeps: they are nearly all of a layer's time."""

_THIN = 8
"""Products whose result is so many times as wide as what they sum over are computed again all the
same: an adapter's second one, over its rank, costs little beside the layer's own, and to keep it
would be to keep every layer's result twice."""


def find_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Gives the decoder layers, as transformers marks them; none where a model does not."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_recomputation(model: torch.nn.Module, mode: str, offload: bool = False) -> None:
    """Sets what is kept in every layer, by its `forward`; names and hooks stay as they are.

    Args:
        model: Before an engine takes it.
        mode: `off`, `selective` or `full`.
        offload: Only with `full`.

    Raises:
        ConfigError: The model does not say what its layers are.
    """
    assert not offload or mode == "full"
    if mode == "off":
        return
    layers = find_layers(model)
    if not layers:
        raise ConfigError(
            f"gradient_checkpointing: {mode} needs to know the model's layers, and "
            f"{type(model).__name__} does not tell; use off"
        )
    for layer in layers:
        layer.forward = _recomputing(layer.forward, mode, offload)


def _recomputing(forward: Callable[..., Any], mode: str, offload: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _choose)

    @functools.wraps(forward)
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not offload:
            return checkpoint(forward, *args, **options, **kwargs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(forward, *args, **options, **kwargs)

    return recomputing


def _choose(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return choose_policy(operator, args)


def choose_policy(operator: Any, inputs: Sequence[Any]) -> CheckpointPolicy:
    """Says what `selective` does with an operator's result.

    Args:
        operator: Of torch.
        inputs: What it is called with.
    """
    name = str(operator.name()).partition(".")[0] if isinstance(operator, OpOverload) else ""  # type: ignore[no-untyped-call]
    is_kept = name in _KEPT
    if name in ("aten::mm", "aten::addmm"):
        summed, width = inputs[1 if name == "aten::mm" else 2].shape
        is_kept = width <= _THIN * summed
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
