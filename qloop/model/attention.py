"""Checks on the real model that documents packed into one row do not see each other.

Packed rows are told apart by their `position_ids` alone: where they start anew, transformers builds
a mask that ends there, with each model's own sliding window and scale, provided that no other mask
and no cache is passed. Models that keep a state instead (linear attention, convolution), or that
read no positions, leak; no error tells. So every run asks its model first.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from qloop.errors import ConfigError

_LENGTHS = (24, 40)
"""Tokens of the document in front and of the one that is watched."""


class Isolation(NamedTuple):
    """Largest change of a document's logits, as a share of its largest logit."""

    swapped: float
    """When another document stands in front of it: 0 but for rounding."""
    alone: float
    """When nothing stands in front of it: small, as other kernels may run."""


def measure_isolation(model: PreTrainedModel, vocabulary_size: int, precision: str) -> Isolation:
    """Measures how far a packed document's logits depend on its neighbour in the row."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device

    def draw(length: int) -> torch.Tensor:
        return torch.randint(vocabulary_size, (1, length), generator=generator).to(device)

    front, other_front, watched = draw(_LENGTHS[0]), draw(_LENGTHS[0]), draw(_LENGTHS[1])
    positions = [torch.arange(length, device=device)[None] for length in _LENGTHS]

    def logits_behind(document: torch.Tensor) -> torch.Tensor:
        row = torch.cat([document, watched], dim=1)
        return _logits(model, row, torch.cat(positions, dim=1))[:, _LENGTHS[0] :]

    was_training = model.training
    model.eval()
    uses_bf16 = precision == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
        packed = logits_behind(front)
        swapped = (packed - logits_behind(other_front)).abs().max()
        alone = (packed - _logits(model, watched, positions[1])).abs().max()
    model.train(was_training)
    scale = packed.abs().max().clamp_min(1e-6)
    return Isolation(float(swapped / scale), float(alone / scale))


def check_isolation(model: PreTrainedModel, vocabulary_size: int, precision: str) -> Isolation:
    """Refuses a model whose packed documents see each other.

    In fp32, models that isolate measure at most 3e-7 (swapped) and 1e-6 (alone); those that leak
    measured 1e-4 and more, even with random weights.

    Raises:
        ConfigError: With the model's type and what was measured.
    """
    measured = measure_isolation(model, vocabulary_size, precision)
    limits = Isolation(1e-5, 1e-3) if precision == "fp32" else Isolation(1e-3, 5e-2)
    # Written so that NaN fails too.
    if measured.swapped <= limits.swapped and measured.alone <= limits.alone:
        return measured
    raise ConfigError(
        f"model_name: {model.config.model_type} lets packed documents see each other: with another "
        f"document in front, logits change by {measured.swapped:.1e} of their size (limit "
        f"{limits.swapped:.0e}), with none by {measured.alone:.1e} (limit {limits.alone:.0e}); "
        "it keeps a state over the row or reads no position_ids, and cannot be trained on packed "
        "blocks; choose a model with plain attention, or try --attention eager"
    )


def _logits(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits.float()
