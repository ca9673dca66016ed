"""Gradient checkpointing: which activations of a layer are kept for the backward pass.

    off        everything that the backward pass needs
    selective  the results of large matrix products and attention; the rest is recomputed
    full       the layer's input; the whole layer is recomputed

With `offload`, the inputs that `full` keeps wait in host memory. All modes give the same numbers:
recomputing draws the same random numbers again.
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
"""Operators whose results `selective` keeps: they take nearly all of a layer's time."""

_THIN = 8
"""A product whose result is more than this many times as wide as its inner dimension is recomputed:
an adapter's second product, over its rank, costs little compared with the layer's own, and keeping
it would store every layer's result twice."""


def find_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns the decoder layers, as transformers marks them; empty where a model does not."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def choose(
    wanted: str,
    *,
    engine: str,
    offloads: bool,
    launcher_recomputes: bool,
    fits: Callable[[str], bool],
) -> str:
    """Chooses the mode of a run: `auto` takes the fastest that fits; only `full` can offload.

    `fits` says whether a run with a mode has room; it is not called for `full`.
    """
    if launcher_recomputes:  # accelerate's FSDP plugin does
        return "off"
    if wanted != "auto":
        return wanted
    # ZeRO-3 gathers weights between the operators whose results selective keeps.
    modes = [] if offloads else ["off"] if engine == "zero3" else ["off", "selective"]
    return next((mode for mode in modes if fits(mode)), "full")


def set_recomputation(model: torch.nn.Module, mode: str, offload: bool = False) -> None:
    """Replaces the `forward` of every layer by one that recomputes; names and hooks stay.

    Call it before an engine wraps the model; `offload` needs the mode `full`.

    Raises:
        ConfigError: The model does not mark its layers.
    """
    assert not offload or mode == "full"
    if mode == "off":
        return
    layers = find_layers(model)
    if not layers:
        raise ConfigError(
            f"gradient_checkpointing: {mode} needs the model's layers, and "
            f"{type(model).__name__} does not mark them; use off"
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
    """Decides whether `selective` keeps the result of torch's operator for these arguments."""
    name = str(operator.name()).partition(".")[0] if isinstance(operator, OpOverload) else ""  # type: ignore[no-untyped-call]
    is_kept = name in _KEPT
    if name in ("aten::mm", "aten::addmm"):
        summed, width = inputs[1 if name == "aten::mm" else 2].shape
        is_kept = width <= _THIN * summed
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
