"""Builds the model of a run: all weights, or a frozen base with adapters.

What is trained is fp32, always: at a learning rate of 1e-5 most updates of a bf16 weight round to
nothing. What is frozen has the compute type (lora) or 4 bits (qlora).
"""

import hashlib
import struct
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.errors import CheckpointError, ConfigError
from qloop.model.adapters import ADAPTER_METHODS, add_adapters, load_adapters
from qloop.model.pretrained import LOADING_ERRORS, cannot_load, load_model_config
from qloop.model.state import collect_weights
from qloop.storage.tensors import SavedTensors, kind_of


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 on a GPU that has it in hardware, else fp32.

    A CPU always gets fp32, though some have bf16 too: elsewhere it is hundreds of times slower, and
    a run should not depend on which of the two machines it met.

    Returns:
        `bf16` or `fp32`.
    """
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


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


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Counts all parameters, a 4-bit one as its own size, and those that are trained."""
    total = trained = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        total += parameter.nbytes * 2 if packed else parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    return total, trained


def fingerprint_weights(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """Hashes names, types, shapes and a spread of some hundred values of every frozen tensor.

    With `dtype`, as if floating-point tensors had that type.

    It tells one base from another, or from a fine-tuned one, in milliseconds; it does not protect
    from someone who changes single weights on purpose.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().reshape(-1)
        scales = getattr(parameter, "quant_state", None)  # of a 4-bit weight
        if scales is not None:  # kept in numbers of one type or another, with the same bytes
            flat = flat.view(torch.uint8)
        shape = tuple(parameter.shape) if scales is None else tuple(scales.shape)
        some = flat[:: max(1, flat.numel() // 256)]
        if dtype and some.is_floating_point():
            some = some.to(dtype)
        digest.update(f"{name} {some.dtype} {shape}".encode())
        values = some.double().tolist()
        digest.update(struct.pack(f"{len(values)}d", *values))
        if scales is not None:
            digest.update(scales.absmax.double().cpu().numpy().tobytes())
            nested = scales.state2.absmax.double().cpu().numpy().tobytes() if scales.nested else b""
            digest.update(nested)
    return digest.hexdigest()


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
    saved.refuse_misfits({name: kind_of(weight) for name, weight in weights.items()})


def _load_base(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    checkpoint: Path | None = None,
    is_sharded: bool = False,
    reads_weights: bool = True,
) -> PreTrainedModel:
    """Loads a causal LM, from safetensors only, and makes sure that no weight was made up."""
    name = str(checkpoint or config.model_name)
    options: dict[str, Any] = _attention(config)
    if config.training_method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype if is_sharded else torch.uint8,
        )
        options["device_map"] = {"": device}
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
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except LOADING_ERRORS as error:
        if checkpoint:
            raise CheckpointError(f"{checkpoint}: its model cannot be loaded: {error}") from error
        raise ConfigError(cannot_load("model_name", name, "model", error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"model_name: {name} is an adapter, not a whole model; give its base, or merge the "
            "two first"
        )
    _give_places(model)
    misshapen = [name for name, module in model.named_modules() if _is_misshapen(module)]
    wrong = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"], *misshapen)))
    if wrong:
        text = f"{len(wrong)} weights are missing or of another shape, the first {wrong[0]}"
        if checkpoint:
            raise CheckpointError(f"{checkpoint}: {text}")
        raise ConfigError(f"model_name: {name}: {text}; is it a causal language model?")
    return model


def _give_places(model: PreTrainedModel) -> None:
    """Gives memory, untouched, to weights that were not read.

    Accelerate finds an optimizer's parameters again by their address, and without memory all have
    the same: every weight but one would silently go untrained.
    """
    given: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                place = given.setdefault(
                    id(parameter), torch.nn.Parameter(torch.empty_like(parameter, device="cpu"))
                )
                setattr(module, name, place)


def _keep_trainable_on_cpu(model: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in the first forward pass without gradients.

    It does so on CPUs that have AVX512-BF16, for good, and the repacked weights pass no gradient:
    training after an evaluation would fail, or go on with gradients missing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_misshapen(module: torch.nn.Module) -> bool:
    """Whether a 4-bit layer was made of a weight of another shape; transformers does not look."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state is not None and tuple(state.shape) != (module.out_features, module.in_features)


def _attention(config: ModelConfig) -> dict[str, Any]:
    """What transformers is told; `documents` is set, and checked, on the model that was built."""
    own = config.attention in ("auto", "documents")
    return {} if own else {"attn_implementation": config.attention}
