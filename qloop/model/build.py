"""Builds the model of a run: fully trained, or a frozen base with adapters.

What is trained is fp32, always: at a learning rate of 1e-5 most updates of a bf16 weight round to
nothing. A frozen base has the run's compute type (lora) or 4 bits (qlora).
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.errors import CheckpointError, ConfigError
from qloop.model.adapters import add_adapters, load_adapters
from qloop.model.pretrained import (
    LOADING_ERRORS,
    attention_options,
    cannot_load,
    load_model_config,
    load_weights,
)
from qloop.model.state import collect_weights
from qloop.storage.tensors import SavedTensors, spec_of


def build_model(
    config: ModelConfig,
    lora: LoraConfig,
    precision: str,
    device: torch.device,
    *,
    seed: int,
    checkpoint: Path | None = None,
    is_sharded: bool = False,
    reads_weights: bool = True,
) -> PreTrainedModel:
    """Builds the model for its method, on the CPU; only a 4-bit base is built on the device.

    Args:
        config: The base and the method.
        lora: The adapters; unused by `full`.
        precision: `bf16` or `fp32`, the type of a frozen base and of computing.
        device: The device of the training.
        seed: Of random weights and of new adapters.
        checkpoint: The folder of the trained weights to load.
        is_sharded: Whether ranks will share the model; 4-bit weights are then stored several to a
            floating-point number.
        reads_weights: False leaves the base of `full` and `lora` uninitialized, for a rank that
            gets its shards from another.

    Raises:
        ConfigError: The base cannot be loaded, or a named layer does not exist.
        CheckpointError: The checkpoint lacks weights.
    """
    torch.manual_seed(seed)
    compute_type = torch.bfloat16 if precision == "bf16" else torch.float32
    if config.training_method == "full":
        model = _build_full(config, checkpoint, reads_weights)
    else:
        base = load_weights(
            config, compute_type, device, is_sharded=is_sharded, reads_weights=reads_weights
        )
        base.requires_grad_(False)
        model = add_adapters(base, config, lora, precision)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpoint and config.training_method != "full":
        load_adapters(model, checkpoint)
    return model


def _build_full(
    config: ModelConfig, checkpoint: Path | None, reads_weights: bool
) -> PreTrainedModel:
    if checkpoint:
        _refuse_other_weights(config, checkpoint)
    if checkpoint or not config.model_config_file:
        cpu = torch.device("cpu")
        return load_weights(
            config, torch.float32, cpu, checkpoint=checkpoint, reads_weights=reads_weights
        )
    try:
        return AutoModelForCausalLM.from_config(
            load_model_config(config),
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            **attention_options(config),
        )
    except LOADING_ERRORS as error:
        file = str(config.model_config_file)
        raise ConfigError(cannot_load("model_config_file", file, "model", error)) from error


def _refuse_other_weights(config: ModelConfig, checkpoint: Path) -> None:
    """Compares a full checkpoint's tensors with its model's before loading any of them."""
    trusts = {"trust_remote_code": config.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(checkpoint, **trusts)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, **trusts)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{checkpoint}: its model cannot be built: {error}") from error
    model.tie_weights()  # tied weights are saved once
    stem, weights = collect_weights(model)
    saved = SavedTensors(checkpoint, stem)
    saved.refuse_misfits({name: spec_of(weight) for name, weight in weights.items()})
