"""Tiny models to test with, from random weights or a saved base.

Bases have weights ten times larger than usual for new ones, so that attention matters: the effect
of a lost mask shows in the first digits.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from references import next_token_loss
from safetensors.torch import load_file, save_file
from workspace import ARCHITECTURES

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.data.batches import MicroBatch
from qloop.model.activations import set_recomputation
from qloop.model.build import build_model
from qloop.model.loss import compute_logits

CPU = torch.device("cpu")
VOCABULARY = 1024
LENGTHS = (5, 30, 1, 21, 7)
"""Documents of a packed row, two of them far longer than a sliding window of 8."""

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_method = pytest.mark.parametrize("method", ["full", "lora", "qlora"])
both_adapters = pytest.mark.parametrize("method", ["lora", "qlora"])


def build(
    source: Path | str,
    method: str = "full",
    precision: str = "fp32",
    seed: int = 0,
    checkpoint: Path | None = None,
    **keys,
):
    """Builds from a base's folder, or from random weights where the source is a config.json."""
    lora = {key: keys.pop(key) for key in list(keys) if key in LoraConfig.model_fields}
    is_file = str(source).endswith(".json")
    place = {"model_config_file": source} if is_file else {"model_name": str(source)}
    config = ModelConfig(
        training_method=method, **{"gradient_checkpointing": False, **place, **keys}
    )
    model = build_model(
        config, LoraConfig(**lora), precision, CPU, seed=seed, checkpoint=checkpoint
    )
    set_recomputation(model, config.gradient_checkpointing, config.offload_activations)
    return model


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def draw_row(rows: int = 1, seed: int = 0) -> MicroBatch:
    """Packs documents of LENGTHS, all of whose positions have a label."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, sum(LENGTHS))
    return MicroBatch(
        torch.randint(VOCABULARY, shape, generator=generator),
        torch.randint(VOCABULARY, shape, generator=generator),
        torch.cat([torch.arange(length) for length in LENGTHS]).repeat(rows, 1),
    )


def cut(row: MicroBatch, here: slice) -> MicroBatch:
    tensors = (row.input_ids, row.labels, row.position_ids)
    return MicroBatch(*(tensor[:, here] for tensor in tensors))


def attending(model, attention: str):
    model.set_attn_implementation(attention)
    return model


def train_steps(model, num_steps: int) -> None:
    trained = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for step in range(num_steps):
        row = draw_row(seed=step)
        (next_token_loss(model, row) / row.labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_parameters(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copy_of(tensors: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == others.keys()
    assert tensors, "something is compared"
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def names_of_unmoved(model, before: dict[str, torch.Tensor]) -> list[str]:
    after = trained_parameters(model)
    return [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


def layers_with_adapters(model) -> set[str]:
    return {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_B.def" in name}


def logits_of(model, row: MicroBatch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return compute_logits(model, row)


def save_adapters(model, folder: Path) -> Path:
    """As a checkpoint does."""
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
