"""The tokenizer of a run, and what the token store needs of it."""

import hashlib
import json

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qloop.config.keys import ModelConfig
from qloop.data.tokens import Encoder
from qloop.errors import ConfigError
from qloop.model.pretrained import LOADING_ERRORS, cannot_load


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with every added token made special.

    `split_special_tokens` keeps text that spells a special token as text, but only if the token is
    marked special, and Qwen2.5 does not mark its `<|fim_prefix|>` and `<|file_sep|>`.

    Raises:
        ConfigError: There is none, or it has no end token.
    """
    name = config.tokenizer_name or config.model_name
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=None if config.tokenizer_name else config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            # Some kinds of model get one made up, with nothing in it.
            raise ValueError("it has no tokenizer files")
    except LOADING_ERRORS as error:
        key = "tokenizer_name" if config.tokenizer_name else "model_name"
        raise ConfigError(cannot_load(key, name, "tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer_name: the tokenizer of {name} has no end-of-text token, so the model could "
            "not learn where a document ends; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.is_fast:
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
        tokenizer.backend_tokenizer.add_special_tokens(
            [AddedToken(str(token), special=True, normalized=False) for token in added]
        )
    return tokenizer


def build_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Reduces a tokenizer to what the token store needs of it."""

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
        if is_byte_level:  # a letter of a token's name for each byte, also of half a character
            return sum(len(name) for name in tokenizer.convert_ids_to_tokens(plain))
        return len(tokenizer.decode(plain).encode()) if plain else 0

    end_id = int(tokenizer.eos_token_id)
    # Some tokenizers put a start token before every text (Llama, Gemma), some end it themselves.
    start_ids = [
        token
        for token in tokenizer("")["input_ids"]
        if token != end_id or token == tokenizer.bos_token_id
    ]
    if tokenizer.is_fast:
        definition = tokenizer.backend_tokenizer.to_str()
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(definition)["decoder"])
    else:
        is_byte_level = False
        definition = json.dumps(sorted(tokenizer.get_vocab().items()))
    settings = f"{type(tokenizer).__name__} {start_ids} {end_id} {definition}"
    return Encoder(
        encode=encode,
        count_bytes=count_bytes,
        start_ids=start_ids,
        end_id=end_id,
        # Not its length: ids may have gaps.
        vocabulary_size=max(tokenizer.get_vocab().values()) + 1,
        fingerprint=hashlib.sha256(settings.encode()).hexdigest(),
    )
