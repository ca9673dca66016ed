"""Held-out loss, perplexity, bits per byte and token accuracy; and completions to look at."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qloop.data.batches import build_micro_batch, count_targets
from qloop.data.packing import BlockIndex
from qloop.data.tokens import TokenStore
from qloop.model.attention import own_attention
from qloop.model.compilation import uncompiled
from qloop.model.loss import TargetLoss

_PROMPT_TOKENS = 96
"""At most this much of a document is given before a completion."""


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of the held-out documents, every target weighing the same."""

    loss: float
    """Nats per target."""
    perplexity: float
    bits_per_byte: float
    """Comparable between tokenizers: all nats, in bits, over the bytes of the text they are for."""
    token_accuracy: float
    """Share of targets that were the likeliest token."""
    target_tokens: int
    target_bytes: int


@dataclass(frozen=True)
class Sample:
    """A completion beside the truth."""

    prefix: str
    completion: str
    truth: str


def evaluate(
    model: torch.nn.Module,
    loss: TargetLoss,
    store: TokenStore,
    index: BlockIndex,
    batch_size: int,
    accelerator: Accelerator,
) -> Evaluation:
    """Measures the model on every held-out document, each rank on its share of the blocks.

    Sums over targets are divided once, at the end, so that the batch size and the number of ranks
    change nothing but the last digits.

    Args:
        model: Unwrapped, in any mode; left as it was.
        loss: The model's.
        store: The held-out documents.
        index: Their blocks.
        batch_size: Blocks in a forward pass.
        accelerator: Knows the device and the ranks.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    with torch.no_grad(), uncompiled(model):
        for first in range(0, len(index), batch_size * num_ranks):
            begin = first + batch_size * rank
            block_ids = np.arange(begin, min(begin + batch_size, len(index)))
            # Where the weights are sharded, every rank has to call the model as often as the
            # others; one that has no block left reads the last one again, and counts nothing.
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
        perplexity=math.exp(min(mean, 700.0)),  # beyond that, infinity for a float
        bits_per_byte=nats / math.log(2) / target_bytes,
        token_accuracy=correct_tokens / target_tokens,
        target_tokens=int(target_tokens),
        target_bytes=target_bytes,
    )


def sample_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    store: TokenStore,
    num_samples: int,
    sample_tokens: int,
    seed: int,
    accelerator: Accelerator,
) -> list[Sample]:
    """Lets the model go on from the start of a few held-out documents, spread over all of them.

    Drawn at temperature 0.8 from the likeliest 95 %; the same seed draws the same.
    """
    was_training = model.training
    model.eval()
    # PEFT generates by the model inside its own, so that the hook which gathers what FSDP2 has
    # sharded of the outermost one is never called.
    is_sharded = hasattr(model, "unshard")
    if is_sharded:
        model.unshard()
    samples = []
    for document in np.unique(np.linspace(0, len(store) - 1, num_samples, dtype=np.int64)).tolist():
        ids = torch.from_numpy(
            store.tokens[store.offsets[document] : store.offsets[document + 1]].astype("int64")
        )
        cut = min(_PROMPT_TOKENS, len(ids) // 2)
        torch.manual_seed(seed + document)
        with (
            torch.no_grad(),
            accelerator.autocast(),
            own_attention(model),
            uncompiled(model),
        ):
            output = model.generate(
                input_ids=ids[None, :cut].to(accelerator.device),
                attention_mask=torch.ones(1, cut, dtype=torch.int64, device=accelerator.device),
                max_new_tokens=sample_tokens,
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                pad_token_id=store.end_id,
                eos_token_id=store.end_id,
                # A rank whose sample has ended goes on calling sharded weights until all have.
                synced_gpus=accelerator.num_processes > 1,
            )[0, cut:]
        samples.append(
            Sample(
                *(
                    tokenizer.decode(piece, skip_special_tokens=True)
                    for piece in (ids[:cut], output, ids[cut : cut + sample_tokens])
                )
            )
        )
    if is_sharded:
        model.reshard()
    model.train(was_training)
    return samples
