"""Adapters on the linear layers of a frozen base: LoRA and QLoRA."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.errors import ConfigError, join_names
from qloop.model.state import collect_weights
from qloop.storage.tensors import SavedTensors, spec_of


def add_adapters(
    base: PreTrainedModel, config: ModelConfig, lora: LoraConfig, precision: str
) -> PreTrainedModel:
    """Adds new adapters to a frozen base.

    Raises:
        ConfigError: A named layer does not exist, or cannot have an adapter.
    """
    import peft

    targets, whole = lora.lora_target_modules, lora.modules_to_save
    is_all = targets == ("all-linear",)
    _refuse_layers(base, "modules_to_save", whole)
    _refuse_layers(base, "lora_target_modules", () if is_all else targets)
    try:
        model = peft.get_peft_model(
            base,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                base_model_name_or_path=config.model_name,
                revision=config.model_revision,
                r=lora.lora_rank,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules="all-linear" if is_all else list(targets),
                modules_to_save=list(whole) or None,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
            ),
        )
    except ValueError as error:  # a layer of a kind that cannot have an adapter
        raise ConfigError(f"lora_target_modules: {', '.join(targets)}: {error}") from error
    for module in model.modules():
        if precision == "bf16" and hasattr(module, "lora_A"):
            # Autocast casts the inputs; PEFT would also cast them to fp32.
            setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010
    return model


def load_adapters(model: PreTrainedModel, checkpoint: Path) -> None:
    """Copies a checkpoint's trained tensors into a model whose trained tensors are fp32 already.

    `PeftModel.from_pretrained` would cast layers that are trained whole to the base's type.

    Raises:
        CheckpointError: The checkpoint has other tensors.
    """
    import peft

    stem, weights = collect_weights(model)
    saved = SavedTensors(checkpoint, stem)
    saved.refuse_misfits({name: spec_of(weight) for name, weight in weights.items()})
    result = peft.set_peft_model_state_dict(model, {name: saved.read(name) for name in weights})
    assert not result.unexpected_keys


def merge_adapters(model: Any) -> PreTrainedModel:
    """Returns the model with every adapter added to its layer.

    Raises:
        ConfigError: An adapter holds NaN or inf.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ConfigError(f"the adapter cannot be merged: {error}") from error


def _refuse_layers(base: PreTrainedModel, key: str, names: tuple[str, ...]) -> None:
    """Raises a ConfigError for layers that PEFT would ignore, or train wrongly.

    PEFT raises only if no name matches at all. Of tied input and output embeddings it would train
    only one, and a merged model would write nonsense.
    """
    modules = dict(base.named_modules())
    named = {
        name: [m for layer, m in modules.items() if f".{layer}".endswith(f".{name}")]
        for name in names
    }
    unknown = [name for name in names if not named[name]]
    if unknown:
        known = {
            layer.rsplit(".", 1)[-1]
            for layer, module in modules.items()
            if not list(module.children()) and list(module.parameters(recurse=False))
        }
        raise ConfigError(
            f"{key}: this model has no layer {join_names(unknown)}; it has "
            f"{join_names(sorted(known), 'and')}"
        )
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    are_tied = ends[1] is not None and ends[0].weight is ends[1].weight
    tied = [name for name in names if any(module in ends for module in named[name])]
    if are_tied and tied:
        raise ConfigError(
            f"{key}: {', '.join(tied)}: this model ties its input and output embeddings, and "
            "training one of them alone would separate them; leave it out"
        )
    packed = [name for name in names if any(_is_4_bit(module) for module in named[name])]
    if packed and key == "modules_to_save":
        raise ConfigError(
            f"{key}: {', '.join(packed)}: has 4 bits under qlora and cannot be trained whole; "
            "use lora, or name it in lora_target_modules"
        )


def _is_4_bit(module: torch.nn.Module) -> bool:
    return any(type(p).__name__ == "Params4bit" for p in module.parameters())
