"""A model without values, on the `meta` device, for planning."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.errors import ConfigError
from qloop.model.adapters import add_adapters
from qloop.model.pretrained import LOADING_ERRORS, cannot_load, load_model_config


def build_meta_model(config: ModelConfig, lora: LoraConfig, precision: str) -> PreTrainedModel:
    """Builds the model of `build_model` without values, on the `meta` device.

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
            raise ConfigError(cannot_load("model_name", name, "model", error)) from error
        if method != "full":
            model.requires_grad_(False)
            if method == "qlora":
                _pack_linear_layers(model, compute_type)
            model = add_adapters(model, config, lora, precision)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class PackedLinear(torch.nn.Linear):
    """A linear layer of the size of NF4 with double quantisation; unpacks its weight at each use.

    Half a byte per weight, a byte for each 64 weights and 4 bytes for each 64 * 256 (Dettmers et
    al. 2023, arXiv 2305.14314).
    """

    def __init__(self, layer: torch.nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        size = layer.weight.numel()
        packed = torch.empty(size // 2 + size // 64 + 4 * (size // (64 * 256)), dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.dtype = dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Unpacks the weight and multiplies."""
        shape = (self.out_features, self.in_features)
        result: torch.Tensor = _Unpacked.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, shape, self.dtype
        )
        return result if self.bias is None else result + self.bias.to(result.dtype)


class _Unpacked(torch.autograd.Function):
    """Keeps the packed weight for the backward pass, which unpacks it again."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, packed: Any, shape: Any, dtype: Any) -> Any:
        ctx.save_for_backward(packed)
        ctx.shape, ctx.dtype = shape, dtype
        return hidden.to(dtype) @ packed.new_empty(shape, dtype=dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (packed,) = ctx.saved_tensors
        # Not `new_empty` again: a compiler would merge the two calls and keep the result.
        return gradient @ packed.new_zeros(ctx.shape, dtype=ctx.dtype), None, None, None


def _pack_linear_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Packs the same layers as transformers: all linear ones except the head."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear and layer is not head:
                setattr(module, name, PackedLinear(layer, dtype))
