"""Builds the tokenizer and the model of a run; the only place that knows full, LoRA and QLoRA.

What is trained is fp32, always: at a learning rate of 1e-5 most updates of a bf16 weight round to
nothing. What is frozen has the compute type (lora) or 4 bits (qlora).
"""

import hashlib
import inspect
import json
import struct
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

from qloop.checkpoint.tensors import SavedTensors, kind_of
from qloop.config import LoraConfig, ModelConfig
from qloop.data.tokens import Encoder
from qloop.errors import CheckpointError, ConfigError, join_names
from qloop.model.saving import collect_weights

ADAPTER_METHODS = ("lora", "qlora")
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers raises when something that a user named cannot be loaded."""


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
        raise ConfigError(_cannot_load(key, name, "tokenizer", error)) from error
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
        model = _add_adapters(base, config, lora)
        if precision == "bf16":  # autocast sees to types; PEFT would keep inputs in fp32 beside it
            _keep_input_types(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpoint and config.training_method in ADAPTER_METHODS:
        _load_adapters(model, checkpoint)
    return model


def build_shapes(config: ModelConfig, lora: LoraConfig, precision: str) -> PreTrainedModel:
    """Builds the model of `build_model` without a single value, on the `meta` device.

    A 4-bit layer is one of its bytes that unpacks its weight each time it is used.

    Raises:
        ConfigError: As `build_model`.
    """
    method = config.training_method
    compute_type = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(
                load_model_config(config),
                dtype=torch.float32 if method == "full" else compute_type,
                trust_remote_code=config.trust_remote_code,
            )
        except LOADING_ERRORS as error:
            name = str(config.model_config_file or config.model_name)
            raise ConfigError(_cannot_load("model_name", name, "model", error)) from error
        if method != "full":
            model.requires_grad_(False)
            if method == "qlora":
                _pack_linear_layers(model, compute_type)
            model = _add_adapters(model, config, lora)
            if precision == "bf16":
                _keep_input_types(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class PackedLinear(torch.nn.Linear):
    """The shape of a linear layer in NF4 with double quantisation.

    Half a byte a weight, a byte for each 64 of them and 4 bytes for each 64 * 256 (Dettmers et al.
    2023, arXiv 2305.14314).
    """

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        size = layer.weight.numel()
        packed = torch.empty(size // 2 + size // 64 + 4 * (size // (64 * 256)), dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.dtype = dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Unpacks, and multiplies."""
        shape = (self.out_features, self.in_features)
        result: torch.Tensor = _Unpacked.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, shape, self.dtype
        )
        return result if self.bias is None else result + self.bias.to(result.dtype)


class _Unpacked(torch.autograd.Function):
    """Keeps the packed weight for the backward pass, and unpacks it there again."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, packed: Any, shape: Any, dtype: Any) -> Any:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.dtype = shape, dtype
        return hidden.to(dtype) @ packed.new_empty(shape, dtype=dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (packed,) = ctx.saved_tensors
        return gradient @ packed.new_empty(ctx.shape, dtype=ctx.dtype), None, None, None


def _pack_linear_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Packs what transformers would: all linear layers but the head."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear and layer is not head:
                setattr(module, name, PackedLinear(layer, dtype))


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
        raise ConfigError(_cannot_load(key, name, "model", error)) from error


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


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Counts all parameters, a 4-bit one as its own size, and those that are trained."""
    total = trained = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        total += parameter.nbytes * 2 if packed else parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    return total, trained


def merge_adapters(model: Any) -> PreTrainedModel:
    """Adds every adapter to the layer that it belongs to, and gives the plain model.

    Raises:
        ConfigError: An adapter holds NaN or inf.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ConfigError(f"the adapter cannot be merged: {error}") from error


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
        raise ConfigError(_cannot_load("model_config_file", file, "model", error)) from error


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
        raise ConfigError(_cannot_load("model_name", name, "model", error)) from error
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


def _add_adapters(base: PreTrainedModel, config: ModelConfig, lora: LoraConfig) -> PreTrainedModel:
    import peft

    targets, whole = lora.lora_target_modules, lora.modules_to_save
    _refuse_layers(base, "modules_to_save", whole)
    if targets != ("all-linear",):
        _refuse_layers(base, "lora_target_modules", targets)
    try:
        return peft.get_peft_model(
            base,
            peft.LoraConfig(
                task_type="CAUSAL_LM",
                base_model_name_or_path=config.model_name,
                revision=config.model_revision,
                r=lora.lora_rank,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules="all-linear" if targets == ("all-linear",) else list(targets),
                modules_to_save=list(whole) or None,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
            ),
        )
    except ValueError as error:  # a layer of a kind that cannot have an adapter
        raise ConfigError(f"lora_target_modules: {', '.join(targets)}: {error}") from error


def _keep_input_types(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010


def _load_adapters(model: PreTrainedModel, checkpoint: Path) -> None:
    """Copies a checkpoint's trained tensors into a model whose own are fp32 already.

    `PeftModel.from_pretrained` would pass layers that are trained whole through the base's type,
    and lose bits on the way.
    """
    import peft

    stem, weights = collect_weights(model)
    saved = SavedTensors(checkpoint, stem)
    saved.refuse_misfits({name: kind_of(weight) for name, weight in weights.items()})
    result = peft.set_peft_model_state_dict(model, {name: saved.read(name) for name in weights})
    assert not result.unexpected_keys


def _refuse_layers(base: PreTrainedModel, key: str, names: tuple[str, ...]) -> None:
    """Raises a ConfigError for names that PEFT would pass over, or train to no good.

    It complains only when no name at all matches. Of a weight that is both the input and the output
    embedding it would train one end, and a merged model would write nonsense.
    """
    named: dict[str, list[torch.nn.Module]] = {name: [] for name in names}
    for layer, module in base.named_modules():
        for name in names:
            if layer == name or layer.endswith(f".{name}"):
                named[name].append(module)
    unknown = [name for name in names if not named[name]]
    if unknown:
        known = {
            layer.rsplit(".", 1)[-1]
            for layer, module in base.named_modules()
            if not list(module.children()) and list(module.parameters(recurse=False))
        }
        raise ConfigError(
            f"{key}: this model has no layer {join_names(unknown)}; it has "
            f"{join_names(sorted(known), 'and')}"
        )
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if ends[1] is not None and ends[0].weight is ends[1].weight:
        tied = [name for name in names if any(module in ends for module in named[name])]
        if tied:
            raise ConfigError(
                f"{key}: {', '.join(tied)}: this model ties its input and output embeddings, and "
                "training one of them alone would tear them apart; leave it out"
            )
    packed = [name for name in names if any(_is_4_bit(module) for module in named[name])]
    if packed and key == "modules_to_save":
        raise ConfigError(
            f"{key}: {', '.join(packed)}: has 4 bits under qlora and cannot be trained whole; "
            "use lora, or name it in lora_target_modules"
        )


def _is_misshapen(module: torch.nn.Module) -> bool:
    """Whether a 4-bit layer was made of a weight of another shape; transformers does not look."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return state is not None and tuple(state.shape) != (module.out_features, module.in_features)


def _is_4_bit(module: torch.nn.Module) -> bool:
    return any(type(p).__name__ == "Params4bit" for p in module.parameters())


def _attention(config: ModelConfig) -> dict[str, Any]:
    """What transformers is told; `documents` is set, and checked, on the model that was built."""
    own = config.attention in ("auto", "documents")
    return {} if own else {"attn_implementation": config.attention}


def _cannot_load(key: str, name: str, what: str, error: Exception) -> str:
    reason = inspect.cleandoc(str(error)).splitlines()[0] if str(error) else type(error).__name__
    where = "a folder here" if Path(name).exists() else "no folder here, so a name on the hub"
    reason = reason if len(reason) <= 300 else f"{reason[:300]}..."
    return f"{key}: no {what} could be loaded from {name} ({where}): {reason}"
