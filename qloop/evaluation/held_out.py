"""Held-out loss, perplexity, bits per byte and token accuracy."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from qloop.data.batches import build_micro_batch, count_targets
from qloop.data.packing import BlockIndex
from qloop.data.tokens import TokenStore
from qloop.model.compilation import uncompiled
from qloop.model.loss import TargetLoss


@dataclass(frozen=True)
class Evaluation:
    """The model's scores on the held-out documents; every target has equal weight."""

    loss: float
    """Nats per target."""
    perplexity: float
    bits_per_byte: float
    """Comparable between tokenizers: the total loss in bits over the UTF-8 bytes of the targets."""
    token_accuracy: float
    """Share of targets that were the model's most likely token."""
    target_tokens: int
    target_bytes: int


def evaluate(
    model: torch.nn.Module,
    loss: TargetLoss,
    store: TokenStore,
    index: BlockIndex,
    batch_size: int,
    accelerator: Accelerator,
) -> Evaluation:
    """Evaluates the model on all held-out documents; each rank reads its share of the blocks.

    Sums over targets are divided once, at the end, so the batch size (blocks in a forward pass) and
    the number of ranks change only the last digits. The model is unwrapped; its mode is restored.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    with torch.no_grad(), uncompiled(model):
        for first in range(0, len(index), batch_size * num_ranks):
            begin = first + batch_size * rank
            block_ids = np.arange(begin, min(begin + batch_size, len(index)))
            # With sharded weights, all ranks must call the model equally often: a rank with no
            # blocks left reads the last one again without counting it.
            read_ids = block_ids if len(block_ids) else np.array([len(index) - 1])
            micro_batch = build_micro_batch(store, index, read_ids)
            prediction = loss.predict(model, micro_batch.to(accelerator.device))
            if len(block_ids):
                sums[:2] += torch.stack(prediction)
                sums[2] += count_targets(store, index, block_ids)
    model.train(was_training)
    nats, correct_tokens, target_tokens = accelerator.reduce(sums, "sum").tolist()
    mean = nats / target_tokens
    target_bytes = int(store.target_bytes.sum())
    return Evaluation(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),  # exp overflows a little above
        bits_per_byte=nats / math.log(2) / target_bytes,
        token_accuracy=correct_tokens / target_tokens,
        target_tokens=int(target_tokens),
        target_bytes=target_bytes,
    )
