"""Checks on the real model that documents packed into one row do not see each other.

`qloop.model.attention` separates documents by their boundaries. Transformers' own attention does it
by `position_ids` alone: where they restart, it builds a mask that ends there, provided that no
other mask and no cache is passed. Models that carry a state along the row (linear attention,
convolution), or ignore positions, leak without an error. So every run compares the logits of a
packed document with those of the same document alone, under the model's own attention.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from qloop.data.batches import IGNORED, MicroBatch
from qloop.errors import ConfigError
from qloop.model.attention import DOCUMENTS, AttentionChoice, own_attention
from qloop.model.loss import compute_logits

_LENGTHS = (24, 40)
"""Tokens of the document in front and of the one whose logits are compared."""


class Isolation(NamedTuple):
    """Largest change of a document's logits, as a share of its largest logit."""

    swapped: float
    """With another document in front of it: 0 but for rounding."""
    alone: float
    """With nothing in front of it, under the model's own attention: small, as kernels differ."""


def set_attention(
    model: PreTrainedModel,
    choice: AttentionChoice,
    *,
    is_wanted: bool,
    precision: str,
    vocabulary_size: int,
) -> tuple[AttentionChoice, Isolation]:
    """Sets the chosen attention, and checks that it isolates documents.

    Unless the config names DOCUMENTS (`is_wanted`), a model for which it fails the check keeps its
    own attention. Returns the attention that is set, and the measured isolation.

    Raises:
        ConfigError: Packed documents see each other.
    """
    if choice.name != DOCUMENTS:
        return choice, check_isolation(model, vocabulary_size, precision)
    own = model.config._attn_implementation
    model.set_attn_implementation(DOCUMENTS)
    try:
        return choice, check_isolation(model, vocabulary_size, precision)
    except (ConfigError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        model.set_attn_implementation(own)
        if is_wanted:
            text = f"attention: documents cannot be used here: {reason}; use auto"
            raise ConfigError(text) from error
    return AttentionChoice(own, reason), check_isolation(model, vocabulary_size, precision)


def measure_isolation(model: PreTrainedModel, vocabulary_size: int, precision: str) -> Isolation:
    """Measures how much a packed document's logits depend on its neighbour in the row."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device

    def draw(length: int) -> torch.Tensor:
        return torch.randint(vocabulary_size, (1, length), generator=generator).to(device)

    front, other_front, watched = draw(_LENGTHS[0]), draw(_LENGTHS[0]), draw(_LENGTHS[1])

    def logits_of(*documents: torch.Tensor) -> torch.Tensor:
        ids = torch.cat(documents, dim=1)
        places = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
        row = MicroBatch(ids, torch.full_like(ids, IGNORED), places)
        return compute_logits(model, row.to(device))[:, -_LENGTHS[1] :]

    was_training = model.training
    model.eval()
    uses_bf16 = precision == "bf16"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
        packed = logits_of(front, watched)
        swapped = (packed - logits_of(other_front, watched)).abs().max()
        with own_attention(model):
            alone = (packed - logits_of(watched)).abs().max()
    model.train(was_training)
    scale = packed.abs().max().clamp_min(1e-6)
    return Isolation(float(swapped / scale), float(alone / scale))


def check_isolation(model: PreTrainedModel, vocabulary_size: int, precision: str) -> Isolation:
    """Refuses a model whose packed documents see each other.

    In fp32, models that isolate documents measure at most 3e-7 (swapped) and 1e-6 (alone); those
    that leak measured 1e-4 and more, even with random weights.

    Raises:
        ConfigError: Names the model's type and both measurements.
    """
    measured = measure_isolation(model, vocabulary_size, precision)
    limits = Isolation(1e-5, 1e-3) if precision == "fp32" else Isolation(1e-3, 5e-2)
    # Written so that NaN fails, too.
    if measured.swapped <= limits.swapped and measured.alone <= limits.alone:
        return measured
    raise ConfigError(
        f"model_name: {model.config.model_type} lets packed documents see each other: with another "
        f"document in front, logits change by {measured.swapped:.1e} of their size (limit "
        f"{limits.swapped:.0e}), with none by {measured.alone:.1e} (limit {limits.alone:.0e}); "
        "it carries a state along the row or ignores position_ids, and cannot be trained on packed "
        "blocks; choose a model with plain attention, or try --attention eager"
    )
