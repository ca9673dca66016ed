"""The loss and its predictions computed plainly, to compare what the product computes with."""

import torch
import torch.nn.functional as F

from qloop.data.batches import IGNORED, MicroBatch
from qloop.model.loss import Prediction, compute_logits


def next_token_loss(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Sums the cross-entropy over a micro-batch's targets, in nats, from all logits."""
    logits = compute_logits(model, micro_batch).flatten(0, 1)
    labels = micro_batch.labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def predict(model: torch.nn.Module, micro_batch: MicroBatch) -> Prediction:
    """Sums loss and correct predictions over a micro-batch's targets, in float64."""
    logits = compute_logits(model, micro_batch).flatten(0, 1).double()
    labels = micro_batch.labels.flatten()
    loss_sum = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return Prediction(loss_sum, (logits.argmax(dim=-1) == labels).sum())
