"""The part of a tokenizer that the token store uses."""

import hashlib
import json
from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase


class Encoder(NamedTuple):
    """Turns texts into token ids, and frames documents."""

    encode: Callable[[list[str]], list[list[int]]]
    """Token ids of texts; adds no token, and text that spells a special token stays text."""
    count_bytes: Callable[[list[int]], int]
    """UTF-8 bytes of the text that some ids spell."""
    start_ids: list[int]
    """Ids that the model expects before every document; often empty."""
    end_id: int
    vocabulary_size: int
    """The largest id plus one; ids may have gaps."""
    fingerprint: str
    """Hash of everything that determines the ids."""


def build_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Builds the encoder of a tokenizer that has an end token (`eos_token`)."""

    def encode(texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def count_bytes(ids: list[int]) -> int:
        plain = [token for token in ids if token not in tokenizer.all_special_ids]
        if is_byte_level:  # a token's name has one letter per byte, even for part of a character
            return sum(len(name) for name in tokenizer.convert_ids_to_tokens(plain))
        return len(tokenizer.decode(plain).encode()) if plain else 0

    end_id = int(tokenizer.eos_token_id)
    # Some tokenizers (Llama, Gemma) put a start token before every text, some an end token after.
    start_ids = [
        token
        for token in tokenizer("")["input_ids"]
        if token != end_id or token == tokenizer.bos_token_id
    ]
    if tokenizer.is_fast:
        definition = tokenizer.backend_tokenizer.to_str()
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(definition)["decoder"])
    else:
        definition = json.dumps(sorted(tokenizer.get_vocab().items()))
        is_byte_level = False
    settings = f"{type(tokenizer).__name__} {start_ids} {end_id} {definition}"
    return Encoder(
        encode=encode,
        count_bytes=count_bytes,
        start_ids=start_ids,
        end_id=end_id,
        vocabulary_size=max(tokenizer.get_vocab().values()) + 1,
        fingerprint=hashlib.sha256(settings.encode()).hexdigest(),
    )
