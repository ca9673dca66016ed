"""Builds the model of a run: all weights, or a frozen base with adapters.

What is trained is fp32, always: at a learning rate of 1e-5 most updates of a bf16 weight round to
nothing. What is frozen has the compute type (lora) or 4 bits (qlora).
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.errors import CheckpointError, ConfigError
from qloop.model.adapters import ADAPTER_METHODS, add_adapters, load_adapters
from qloop.model.pretrained import (
    LOADING_ERRORS,
    _attention,
    _keep_trainable_on_cpu,
    _load_base,
    cannot_load,
    load_model_config,
)
from qloop.model.state import collect_weights
from qloop.storage.tensors import SavedTensors, spec_of


def build_model(
    config: ModelConfig,
    lora: LoraConfig,
    precision: str,
    device: torch.device,
    seed: int,
    checkpoint: Path | None = None,
    is_sharded: bool = False,
    reads_weights: bool = True,
) -> PreTrainedModel:
    """Builds the model for its method, on the CPU; only a 4-bit base is made on the device.

    Args:
        config: The base and the method.
        lora: The adapters; unused by `full`.
        precision: `bf16` or `fp32`, the type of a frozen base and of computing.
        device: Where it will be trained.
        seed: Decides new weights: a model from random weights, new adapters.
        checkpoint: A checkpoint's folder to take the trained weights from, instead of starting
            anew.
        is_sharded: It will be cut over the ranks, which 4-bit weights allow only if they are
            kept as floating-point numbers, several in one.
        reads_weights: False leaves a base of `full` and `lora` without values, in memory that is
            not touched: this rank gets its shards from another.

    Raises:
        ConfigError: The base cannot be found, is no causal language model, or lacks weights; a
            named layer does not exist.
        CheckpointError: The checkpoint lacks weights.
    """
    torch.manual_seed(seed)
    compute_type = torch.bfloat16 if precision == "bf16" else torch.float32
    if config.training_method == "full":
        model = _build_full(config, checkpoint, reads_weights)
    else:
        base = _load_base(config, compute_type, device, None, is_sharded, reads_weights)
        base.requires_grad_(False)
        _keep_trainable_on_cpu(base)
        model = add_adapters(base, config, lora, precision)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpoint and config.training_method in ADAPTER_METHODS:
        load_adapters(model, checkpoint)
    return model


def _build_full(
    config: ModelConfig, checkpoint: Path | None, reads_weights: bool
) -> PreTrainedModel:
    if checkpoint:
        _refuse_other_weights(config, checkpoint)
    if checkpoint or not config.model_config_file:
        cpu = torch.device("cpu")
        return _load_base(config, torch.float32, cpu, checkpoint, reads_weights=reads_weights)
    try:
        return AutoModelForCausalLM.from_config(
            load_model_config(config),
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            **_attention(config),
        )
    except LOADING_ERRORS as error:
        file = str(config.model_config_file)
        raise ConfigError(cannot_load("model_config_file", file, "model", error)) from error


def _refuse_other_weights(config: ModelConfig, checkpoint: Path) -> None:
    """Compares a full checkpoint's tensors with those of its model before one of them is loaded."""
    try:
        model_config = AutoConfig.from_pretrained(
            checkpoint, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                model_config, dtype=torch.float32, trust_remote_code=config.trust_remote_code
            )
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{checkpoint}: its model cannot be built: {error}") from error
    model.tie_weights()  # what is tied is saved once
    stem, weights = collect_weights(model)
    saved = SavedTensors(checkpoint, stem)
    saved.refuse_misfits({name: spec_of(weight) for name, weight in weights.items()})
