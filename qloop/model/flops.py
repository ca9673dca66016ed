"""Model FLOPs: the arithmetic that a step needs, from shapes alone.

As in the definition of MFU (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B), this counts
matrix products, forward and backward, and attention over the causal part of each document. It does
not count the recomputation of gradient checkpointing, work on masked pairs, norms, activations and
the loss. So a step that does less work for the same result shows a higher MFU.

A linear layer of 2 inputs and 3 outputs has 6 weights: 12 FLOPs per position forward (each weight
multiplies and adds), 24 backward if it is trained (gradients of weight and input), 12 if frozen.
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
    """The FLOPs of a model, by the lengths of its documents."""

    linear: Flops
    """Of all linear layers, per position."""
    attention_width: int
    """heads * head_dim."""
    windows: dict[int | None, int]
    """Number of layers by attention window, the own position included; None: no limit."""

    def of(self, lengths: Integers) -> int:
        """Counts both passes over slices of these lengths; padding is a slice like any other."""
        return sum(self.linear) * int(lengths.sum()) + sum(self.of_attention(lengths))

    def of_attention(self, lengths: Integers) -> Flops:
        """Counts the two products of attention, scores and values, in all layers.

        Each takes 2 * head_dim FLOPs per head and attended pair; backward twice as many.
        """
        pairs = sum(count_pairs(lengths, window) * n for window, n in self.windows.items())
        forward = 2 * 2 * self.attention_width * pairs
        return Flops(forward, 2 * forward)


def build_model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """Reads a model's shapes, before it is sharded; on any device, `meta` too.

    Returns:
        None if the count would be wrong: for a mixture of experts, for attention that is neither
        full nor over a sliding window, or for weights of two or more dimensions in layers that are
        neither linear nor embeddings.
    """
    config = model.config.get_text_config()
    windows = find_windows(config)
    has_other_weights = any(
        parameter.ndim > 1
        for module in model.modules()
        if not isinstance(module, torch.nn.Linear | Conv1D | torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    )
    if windows is None or has_other_weights or getattr(config, "num_experts_per_tok", None):
        return None
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFlops(linear_flops_per_token(model), heads * int(head_dim), windows)


def linear_flops_per_token(model: torch.nn.Module) -> Flops:
    """Counts the products of all linear layers at one position, including the output head.

    An embedding is a look-up and costs nothing. A frozen layer costs the gradient of its input,
    even below the first trained layer: with adapters the count is too high by a part of the first
    layer, or by more if only the last layers have adapters.
    """
    forward = backward = 0
    for name, module in model.named_modules():
        if "original_module" in name.split("."):  # PEFT trains and uses a copy of it
            continue
        if isinstance(module, Conv1D):
            products = 2 * module.nx * module.nf
        elif isinstance(module, torch.nn.Linear):  # a 4-bit weight's tensor has half its size
            products = 2 * module.in_features * module.out_features
        else:
            continue
        forward += products
        backward += products * (2 if module.weight.requires_grad else 1)
    return Flops(forward, backward)


def find_windows(config: PreTrainedConfig) -> dict[int | None, int] | None:
    """Counts the layers by attention window; None if a layer has another kind of attention."""
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
