"""Completions of held-out documents, to look at."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qloop.data.tokens import TokenStore
from qloop.model.attention import own_attention
from qloop.model.compilation import uncompiled

_PROMPT_TOKENS = 96
"""At most this much of a document is given before a completion."""


@dataclass(frozen=True)
class Sample:
    """A completion beside the truth."""

    prefix: str
    completion: str
    truth: str


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
