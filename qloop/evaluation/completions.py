"""Completions of held-out documents, for people to read."""

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
"""Maximum number of a document's tokens that form the prompt."""


@dataclass(frozen=True)
class Sample:
    """A completion, with the prompt and the document's own continuation."""

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
    """Lets the model continue a few held-out documents, spread evenly over all of them.

    Each gets at most `sample_tokens` new tokens, drawn at temperature 0.8 from the most likely
    95 %; equal seeds draw equal tokens. The model is unwrapped; its mode is restored.
    """
    was_training = model.training
    model.eval()
    # PEFT generates with its inner model. FSDP2's hook on the outermost model, which gathers that
    # model's own shards, is then never called.
    is_sharded = hasattr(model, "unshard")
    if is_sharded:
        model.unshard()
    samples = []
    for document in np.unique(np.linspace(0, len(store) - 1, num_samples, dtype=np.int64)).tolist():
        tokens = store.tokens[store.offsets[document] : store.offsets[document + 1]]
        ids = torch.from_numpy(tokens.astype("int64"))
        cut = min(_PROMPT_TOKENS, len(ids) // 2)
        torch.manual_seed(seed + document)
        completion = _generate(model, ids[:cut], sample_tokens, store.end_id, accelerator)
        parts = (ids[:cut], completion, ids[cut : cut + sample_tokens])
        samples.append(Sample(*(tokenizer.decode(p, skip_special_tokens=True) for p in parts)))
    if is_sharded:
        model.reshard()
    model.train(was_training)
    return samples


def _generate(
    model: Any, prompt: torch.Tensor, max_tokens: int, end_id: int, accelerator: Accelerator
) -> torch.Tensor:
    """Returns the tokens that follow a prompt, [tokens]."""
    input_ids = prompt[None].to(accelerator.device)
    with torch.no_grad(), accelerator.autocast(), own_attention(model), uncompiled(model):
        output: torch.Tensor = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=end_id,
            eos_token_id=end_id,
            # A rank whose sample has ended keeps calling the sharded weights until all have.
            synced_gpus=accelerator.num_processes > 1,
        )
    return output[0, len(prompt) :]
