"""What a user names: the errors it makes, and the description of a model's architecture."""

import inspect
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from qloop.config.keys import ModelConfig
from qloop.errors import ConfigError

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers raises when something that a user named cannot be loaded."""


def load_model_config(config: ModelConfig) -> PreTrainedConfig:
    """Reads the description of the model's architecture, without its weights.

    Raises:
        ConfigError: It cannot be found or read.
    """
    name = str(config.model_config_file or config.model_name)
    key = "model_config_file" if config.model_config_file else "model_name"
    try:
        return AutoConfig.from_pretrained(
            name,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    except LOADING_ERRORS as error:
        raise ConfigError(cannot_load(key, name, "model", error)) from error


def check_sizes(model_config: PreTrainedConfig, vocabulary_size: int, max_seq_length: int) -> None:
    """Checks that the model can read such token ids and such long blocks.

    Raises:
        ConfigError: It cannot; with both numbers.
    """
    text_config = model_config.get_text_config()
    if vocabulary_size > text_config.vocab_size:
        raise ConfigError(
            f"tokenizer_name: the tokenizer has ids up to {vocabulary_size - 1}, the model's "
            f"embedding only {text_config.vocab_size} rows; use the model's own tokenizer"
        )
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest and max_seq_length > longest:
        raise ConfigError(
            f"max_seq_length: must be at most {longest}, the model's longest context, "
            f"got {max_seq_length}"
        )
    rope = getattr(text_config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or longest
    # These take their scale from the longest document of the whole batch, so that beyond the
    # original context one document would change its neighbours.
    is_shared = rope.get("rope_type") in ("dynamic", "longrope")
    if is_shared and original and max_seq_length > original:
        raise ConfigError(
            f"max_seq_length: must be at most {original}, since beyond it this model's rotary "
            f"positions ({rope['rope_type']}) depend on the other documents, got {max_seq_length}"
        )


def cannot_load(key: str, name: str, what: str, error: Exception) -> str:
    """Says what could not be loaded from where, and why, as transformers puts it."""
    reason = inspect.cleandoc(str(error)).splitlines()[0] if str(error) else type(error).__name__
    where = "a folder here" if Path(name).exists() else "no folder here, so a name on the hub"
    if "FlashAttention" in reason:  # the model is well, but for what it was to attend by
        return f"attention: {reason.rstrip('.')}; use auto"
    reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
    return f"{key}: no {what} could be loaded from {name} ({where}): {reason}"
