"""Loads what a user names: a model's config, its tokenizer and its weights."""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qloop.config.keys import ModelConfig
from qloop.errors import CheckpointError, ConfigError

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError)
"""Raised by transformers when something that a user named cannot be loaded."""


def load_model_config(config: ModelConfig) -> PreTrainedConfig:
    """Loads the model's config: its architecture without its weights.

    Raises:
        ConfigError: It cannot be found or read.
    """
    name = str(config.model_config_file or config.model_name)
    key = "model_config_file" if config.model_config_file else "model_name"
    try:
        return AutoConfig.from_pretrained(
            name, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except LOADING_ERRORS as error:
        raise ConfigError(cannot_load(key, name, "model", error)) from error


def check_sizes(model_config: PreTrainedConfig, vocabulary_size: int, max_seq_length: int) -> None:
    """Checks that the model has an embedding for every token id, and a long enough context.

    Raises:
        ConfigError: It does not; the message has both numbers.
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
    # These take their scale from the longest document of the batch, so beyond the original context
    # a document would change its neighbours' positions.
    is_shared = rope.get("rope_type") in ("dynamic", "longrope")
    if is_shared and original and max_seq_length > original:
        raise ConfigError(
            f"max_seq_length: must be at most {original}, since beyond it this model's rotary "
            f"positions ({rope['rope_type']}) depend on the other documents, got {max_seq_length}"
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with every added token made special.

    `split_special_tokens` encodes text that spells a special token as text, but only if the token
    is marked special, and Qwen2.5 does not mark its `<|fim_prefix|>` and `<|file_sep|>`.

    Raises:
        ConfigError: There is no tokenizer, or it has no end-of-text token.
    """
    name = config.tokenizer_name or config.model_name
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=None if config.tokenizer_name else config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
        if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            # For some model types, transformers makes up an empty tokenizer.
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


def load_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    checkpoint: Path | None = None,
    is_sharded: bool = False,
    reads_weights: bool = True,
) -> PreTrainedModel:
    """Loads a causal LM, from safetensors only, with every weight from its files.

    Args:
        config: Names the model; under `qlora` its linear layers get 4 bits.
        dtype: The type of the weights, or of computing with 4-bit ones.
        device: Where 4-bit weights are built; others are built on the CPU.
        checkpoint: A full checkpoint's folder to load instead.
        is_sharded: Stores 4-bit weights as numbers of `dtype`, which FSDP can shard.
        reads_weights: False leaves weights other than 4-bit ones uninitialized.

    Raises:
        ConfigError: The model cannot be loaded, is an adapter, or lacks weights.
        CheckpointError: The same of a checkpoint.
    """
    name = str(checkpoint or config.model_name)
    options: dict[str, Any] = attention_options(config)
    if config.training_method == "qlora":
        options |= _four_bit_options(dtype, device, is_sharded)
    elif not reads_weights:
        options["device_map"] = {"": "meta"}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=None if checkpoint else config.model_revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except LOADING_ERRORS as error:
        if checkpoint:
            raise CheckpointError(f"{checkpoint}: its model cannot be loaded: {error}") from error
        raise ConfigError(cannot_load("model_name", name, "model", error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"model_name: {name} is an adapter, not a whole model; give its base, or merge the two"
        )
    _allocate(model)
    _keep_trainable_on_cpu(model)
    misshapen = [name for name, module in model.named_modules() if _is_misshapen(module)]
    wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"], *misshapen)))
    if wrong:
        text = f"{len(wrong)} weights are missing or of another shape, the first {wrong[0]}"
        if checkpoint:
            raise CheckpointError(f"{checkpoint}: {text}")
        raise ConfigError(f"model_name: {name}: {text}; is it a causal language model?")
    return model


def _four_bit_options(dtype: torch.dtype, device: torch.device, is_sharded: bool) -> dict[str, Any]:
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if is_sharded else torch.uint8,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def attention_options(config: ModelConfig) -> dict[str, Any]:
    """Returns the attention for transformers to load with; `isolation.set_attention` sets ours."""
    is_ours = config.attention in ("auto", "documents")
    return {} if is_ours else {"attn_implementation": config.attention}


def cannot_load(key: str, name: str, what: str, error: Exception) -> str:
    """Builds the message of a failed load: the key, the place and transformers' reason."""
    reason = inspect.cleandoc(str(error)).splitlines()[0] if str(error) else type(error).__name__
    where = "a folder here" if Path(name).exists() else "no folder here, so a name on the hub"
    if "FlashAttention" in reason:  # the model exists; its attention is the problem
        return f"attention: {reason.rstrip('.')}; use auto"
    if len(reason) > 300:
        reason = f"{reason[:300]}..."
    return f"{key}: no {what} could be loaded from {name} ({where}): {reason}"


def _allocate(model: PreTrainedModel) -> None:
    """Allocates memory for weights that were not read, without touching it.

    Accelerate identifies an optimizer's parameters by their address, and on `meta` all have the
    same: every weight but one would silently stay untrained.
    """
    allocated: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
                setattr(module, name, allocated.setdefault(id(parameter), empty))


def _keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in the first forward pass without gradients.

    On CPUs with AVX512-BF16 it does so for good, and repacked weights pass no gradient: training
    after an evaluation would fail, or continue with gradients missing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_misshapen(module: torch.nn.Module) -> bool:
    """Compares the shape of a 4-bit weight with its layer's, which transformers does not check."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state is not None and tuple(state.shape) != (module.out_features, module.in_features)
