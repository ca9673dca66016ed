"""Model FLOPs: how much arithmetic a step asks for, from shapes alone, and how fast a device is.

Counted is what the model needs, as in the definition of MFU (PaLM, Chowdhery et al. 2022, arXiv
2204.02311, appendix B): matrix products forward and backward, and attention over the causal part
of each document. Not counted are what gradient checkpointing computes again, what an
implementation spends on masked pairs, and norms, activations and the loss. So less work done for
the same step shows as a higher MFU, and more work never does.

A linear layer of 2 in and 3 out has 6 weights: 12 FLOPs per position forward (a multiplication and
an addition each), 24 backward if it is trained (its gradient and its input's), 12 if it is frozen.
Position 4 of a document attends to 5 positions; with a window of 3, to 3.

    >>> count_pairs(np.array([5]), window=None), count_pairs(np.array([5]), window=3)
    (15, 12)
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qloop.data.packing import Integers


class Flops(NamedTuple):
    """Floating-point operations of both passes."""

    forward: int
    backward: int


@dataclass(frozen=True)
class ModelFlops:
    """What a model asks for; built once, from shapes."""

    linear: Flops
    """Of all linear layers, per position."""
    attention_width: int
    """heads * head_dim."""
    windows: dict[int | None, int]
    """Layers by how many positions they look back over, themselves included; None: all."""

    def of(self, lengths: Integers) -> int:
        """Counts both passes over slices of these lengths; padding is a slice like any other."""
        attention = _attention(self.attention_width, self.windows, lengths)
        return sum(self.linear) * int(lengths.sum()) + sum(attention)


def build_model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """Reads a model's shapes; before it is sharded, and on any device, `meta` too.

    Returns:
        None where the count would be wrong: a mixture of experts, attention that is not over all
        or the last so many positions, or weights of two or more dimensions in layers of another
        kind than linear and embedding.
    """
    config = model.config.get_text_config()
    windows = find_windows(config)
    if windows is None or _has_other_weights(model) or _has_experts(config):
        return None
    return ModelFlops(linear_flops_per_token(model), _attention_width(config), windows)


def linear_flops_per_token(model: torch.nn.Module) -> Flops:
    """Counts the products of all linear layers at one position, the output head among them.

    An embedding is looked up, which costs nothing. A frozen layer costs the gradient of its input,
    also below the first trained one: an adapter's run is counted too high by a part of the first
    layer, or by more where only the last layers have adapters.
    """
    forward = backward = 0
    for module in _linear_layers(model):
        products = 2 * _count_weights(module)
        forward += products
        backward += products * (2 if module.weight.requires_grad else 1)
    return Flops(forward, backward)


def attention_flops(config: PreTrainedConfig, lengths: Integers) -> Flops:
    """Counts the two products of attention, of all layers, over slices of these lengths.

    Two products per head and attended pair, scores and values, of 2 * head_dim FLOPs each; twice
    as many backward, frozen or not.

    Raises:
        ValueError: Some layers attend in another way.
    """
    windows = find_windows(config)
    if windows is None:
        raise ValueError(f"{config.model_type}: layers of kinds {sorted(set(config.layer_types))}")
    return _attention(_attention_width(config), windows, lengths)


def find_windows(config: PreTrainedConfig) -> dict[int | None, int] | None:
    """Counts the layers by their attention window; None where a layer has another attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {window: int(config.num_hidden_layers)}
    known = {"full_attention": None, "sliding_attention": window}
    if not known.keys() >= set(kinds):
        return None
    return dict(Counter(known[kind] for kind in kinds))


def count_pairs(lengths: Integers, window: int | None) -> int:
    """Counts (position, attended position) over slices: position i attends to min(i+1, window)."""
    seen = lengths if window is None else np.minimum(lengths, window)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def _attention(width: int, windows: dict[int | None, int], lengths: Integers) -> Flops:
    pairs = sum(layers * count_pairs(lengths, window) for window, layers in windows.items())
    forward = 2 * 2 * width * pairs
    return Flops(forward, 2 * forward)


def _attention_width(config: PreTrainedConfig) -> int:
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * int(head_dim)


def _linear_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Lists them; of a layer that PEFT trains whole, the copy that is used."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and "original_module" not in name.split(".")
    ]


def _count_weights(module: torch.nn.Module) -> int:
    """Counts by the layer's own numbers: a 4-bit weight's tensor has half its size."""
    if isinstance(module, Conv1D):
        return int(module.nx * module.nf)
    return int(module.in_features * module.out_features)  # type: ignore[operator]


def _has_other_weights(model: torch.nn.Module) -> bool:
    known = torch.nn.Linear | Conv1D | torch.nn.Embedding
    return any(
        parameter.ndim > 1
        for module in model.modules()
        if not isinstance(module, known)
        for parameter in module.parameters(recurse=False)
    )


def _has_experts(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "num_experts_per_tok", None))
