"""The loss: a sum over targets, in nats, to be divided by the targets of the whole step."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qloop.data.batches import IGNORED, MicroBatch


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
    logits: torch.Tensor = model(
        input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, use_cache=False
    ).logits
    return logits.float()


def next_token_loss(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Sums the cross-entropy over a micro-batch's targets, in nats.

    Labels are shifted already: position i's label is the token after it in its document.
    """
    logits = compute_logits(model, micro_batch)
    return F.cross_entropy(
        logits.flatten(0, 1), micro_batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def predict(model: torch.nn.Module, micro_batch: MicroBatch) -> Prediction:
    """Sums loss and right answers over a micro-batch's targets, in float64."""
    logits = compute_logits(model, micro_batch).flatten(0, 1)
    labels = micro_batch.labels.flatten()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    # IGNORED is no token id, so that it is never counted as right.
    return Prediction(losses.double().sum(), (logits.argmax(dim=-1) == labels).sum())
