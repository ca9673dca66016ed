"""AdamW: which weights decay, the gradient norm, and one update by hand."""

import math
from pathlib import Path

import pytest
import torch
from workspace import ARCHITECTURES, write_model_config

from qloop.config import LoraConfig, ModelConfig, OptimizerConfig
from qloop.model.build import build_model
from qloop.optimizer import (
    build_optimizer,
    clip_gradients,
    measure_grad_norm,
    set_learning_rate,
    split_for_decay,
)

CPU = torch.device("cpu")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# What names tell: Qwen's and GPT-2's norms, any bias, embeddings of tokens and of positions.
SPARED = ("norm.weight", "layernorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", ".bias")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "wpe.weight")


def build(folder: Path, architecture: str = "qwen2", **keys) -> torch.nn.Module:
    file = write_model_config(folder, architecture, **keys)
    config = ModelConfig(model_config_file=file, gradient_checkpointing=False)
    return build_model(config, LoraConfig(), "fp32", CPU, seed=0)


def build_lora(folder: Path, **keys) -> torch.nn.Module:
    """Adapters on an untied base."""
    build(folder / "config", tie_word_embeddings=False).save_pretrained(folder / "base")
    config = ModelConfig(
        model_name=str(folder / "base"), training_method="lora", gradient_checkpointing=False
    )
    return build_model(config, LoraConfig(**keys), "fp32", CPU, seed=0)


def trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameters_with(gradients: list[list[float]]) -> list[torch.nn.Parameter]:
    """One parameter, all zeros, for each gradient."""
    parameters = [torch.nn.Parameter(torch.zeros(len(values))) for values in gradients]
    for parameter, values in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(values)
    return parameters


def build_linear(**keys) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A weight of 2 that decays and a bias of -1 that does not."""
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(-1.0)
    return model, build_optimizer(model, OptimizerConfig(**keys))


def update(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, gradient: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


# Which weights decay


@every_architecture
def test_norms_biases_and_embeddings_do_not_decay_and_all_else_does(tmp_path, architecture):
    model = build(tmp_path, architecture)
    decayed, spared = split_for_decay(model)
    expected = {name for name in trained_names(model) if name.endswith((*SPARED, *EMBEDDINGS))}
    assert set(spared) == expected
    assert set(decayed) == set(trained_names(model)) - expected


@every_architecture
def test_every_trained_parameter_is_in_exactly_one_group(tmp_path, architecture):
    model = build(tmp_path, architecture)
    optimizer = build_optimizer(model, OptimizerConfig())
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


@every_architecture
@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_decays_unless_it_is_the_embedding_too(tmp_path, architecture, tied):
    model = build(tmp_path, architecture, tie_word_embeddings=tied)
    head = model.get_output_embeddings().weight
    decayed, spared = split_for_decay(model)
    assert any(parameter is head for parameter in decayed.values()) is not tied
    assert any(parameter is head for parameter in spared.values()) is tied


@every_architecture
def test_there_is_something_that_decays_and_something_that_does_not(tmp_path, architecture):
    decayed, spared = split_for_decay(build(tmp_path, architecture))
    assert len(decayed) >= 8
    assert len(spared) >= 5


def test_biases_are_met_where_an_architecture_has_them(tmp_path):
    for architecture in ("qwen2", "gpt2", "starcoder2"):
        _, spared = split_for_decay(build(tmp_path / architecture, architecture))
        assert any(name.endswith(".bias") for name in spared)


def test_adapters_decay(tmp_path):
    model = build_lora(tmp_path)
    decayed, spared = split_for_decay(model)
    assert set(decayed) == set(trained_names(model))
    assert spared == {}
    assert all("lora_A" in name or "lora_B" in name for name in decayed)


def test_embeddings_trained_beside_adapters_do_not_decay_and_an_untied_head_does(tmp_path):
    model = build_lora(tmp_path, modules_to_save=("embed_tokens", "lm_head"))
    decayed, spared = split_for_decay(model)
    assert [name.split(".")[-4] for name in spared] == ["embed_tokens"]
    assert [name.split(".")[-4] for name in decayed if "modules_to_save" in name] == ["lm_head"]
    assert {*decayed, *spared} == set(trained_names(model))


def test_the_magnitudes_of_dora_do_not_decay(tmp_path):
    _, spared = split_for_decay(build_lora(tmp_path, use_dora=True))
    assert len(spared) == 14
    assert all("lora_magnitude_vector" in name for name in spared)


def test_a_frozen_base_is_in_no_group(tmp_path):
    model = build_lora(tmp_path)
    optimizer = build_optimizer(model, OptimizerConfig())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(parameters) == len(trained_names(model)) == 28
    assert all(parameter.requires_grad for parameter in parameters)


def test_the_groups_have_the_decay_of_the_config_and_none(tmp_path):
    optimizer = build_optimizer(build(tmp_path), OptimizerConfig(weight_decay=0.05))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


# The rate


def test_the_rate_is_set_in_all_groups():
    _, optimizer = build_linear()
    set_learning_rate(optimizer, 3e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 3e-4]


def test_nothing_moves_before_a_rate_is_set():
    model, optimizer = build_linear(weight_decay=0.5)
    update(model, optimizer, gradient=1.0)
    assert (model.weight.item(), model.bias.item()) == (2.0, -1.0)


def test_the_rate_set_last_counts():
    """A first update moves by the rate itself, whatever the gradient's size."""
    model, optimizer = build_linear(weight_decay=0.0)
    set_learning_rate(optimizer, 5.0)
    set_learning_rate(optimizer, 0.25)
    update(model, optimizer, gradient=7.0)
    assert model.weight.item() == pytest.approx(1.75, rel=1e-6)
    assert model.bias.item() == pytest.approx(-1.25, rel=1e-6)


# The update


@pytest.mark.parametrize("epsilon", [1e-8, 0.1])
def test_three_updates_follow_the_formula_of_adamw(epsilon):
    """Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2: decay beside the moments."""
    model, optimizer = build_linear(
        weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=epsilon
    )
    weight, bias, first, second = 2.0, -1.0, 0.0, 0.0
    for count, (gradient, rate) in enumerate([(0.5, 0.1), (-2.0, 0.3), (0.25, 0.2)], start=1):
        set_learning_rate(optimizer, rate)
        update(model, optimizer, gradient)
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        corrected = math.sqrt(second / (1 - 0.9**count)) + epsilon
        move = rate * first / (1 - 0.8**count) / corrected
        weight = weight - rate * 0.1 * weight - move
        bias = bias - move
    assert model.weight.item() == pytest.approx(weight, rel=1e-5)
    assert model.bias.item() == pytest.approx(bias, rel=1e-5)


def test_decay_does_not_depend_on_the_gradient():
    """With a gradient of 0 the weight loses rate * weight_decay of itself, and nothing else."""
    model, optimizer = build_linear(weight_decay=0.1)
    set_learning_rate(optimizer, 0.5)
    update(model, optimizer, gradient=0.0)
    assert model.weight.item() == pytest.approx(1.9, rel=1e-6)
    assert model.bias.item() == -1.0


# The gradient norm


def test_the_norm_is_taken_over_all_parameters():
    """3^2 + 4^2 + 12^2 = 13^2."""
    assert measure_grad_norm(parameters_with([[3.0, 4.0], [12.0]])).item() == 13.0


def test_parameters_without_a_gradient_are_passed_over():
    parameters = [*parameters_with([[3.0, 4.0]]), torch.nn.Parameter(torch.ones(2))]
    assert measure_grad_norm(parameters).item() == 5.0


def test_the_norm_does_not_depend_on_the_order_of_parameters():
    parameters = parameters_with([[3.0, 4.0], [12.0]])
    assert measure_grad_norm(parameters) == measure_grad_norm(reversed(parameters))


def test_measuring_changes_no_gradient():
    parameters = parameters_with([[3.0, 4.0], [12.0]])
    measure_grad_norm(parameters)
    assert [parameter.grad.tolist() for parameter in parameters] == [[3.0, 4.0], [12.0]]


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_one_bad_gradient_makes_the_norm_not_finite_and_harms_no_other(bad):
    parameters = parameters_with([[3.0, 4.0], [1.0, float(bad)], [12.0]])
    assert not math.isfinite(measure_grad_norm(parameters))
    assert [parameter.grad.tolist() for parameter in parameters[::2]] == [[3.0, 4.0], [12.0]]
    assert parameters[1].grad[0] == 1.0


def test_the_norm_of_a_model_is_that_of_its_gradients_put_together(tmp_path):
    model = build(tmp_path)
    ids = torch.arange(20)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    together = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert measure_grad_norm(model.parameters()).item() == pytest.approx(
        together.double().norm().item(), rel=1e-5
    )


# Clipping


def test_large_gradients_are_scaled_to_the_limit_together():
    parameters = parameters_with([[3.0, 4.0], [12.0]])
    clip_gradients(parameters, 2.6, measure_grad_norm(parameters))
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    assert parameters[1].grad.tolist() == pytest.approx([2.4], rel=1e-6)
    assert measure_grad_norm(parameters).item() == pytest.approx(2.6, rel=1e-6)


def test_small_gradients_stay_as_they_are():
    parameters = parameters_with([[3.0, 4.0], [12.0]])
    clip_gradients(parameters, 13.1, measure_grad_norm(parameters))
    assert [parameter.grad.tolist() for parameter in parameters] == [[3.0, 4.0], [12.0]]


def test_gradients_at_the_limit_change_by_a_millionth_at_most():
    parameters = parameters_with([[3.0, 4.0], [12.0]])
    clip_gradients(parameters, 13.0, measure_grad_norm(parameters))
    assert measure_grad_norm(parameters).item() == pytest.approx(13.0, rel=1e-6)


def test_gradients_of_zero_stay_zero():
    parameters = parameters_with([[0.0, 0.0]])
    clip_gradients(parameters, 1.0, measure_grad_norm(parameters))
    assert parameters[0].grad.tolist() == [0.0, 0.0]


def test_the_norm_of_a_large_gradient_of_few_large_values_is_exact():
    """As of an embedding: a few frequent tokens, and many rows of next to nothing."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(8192, 256, generator=generator) * 1e-3
    gradient[:8] *= 3000
    (parameter,) = parameters_with([[0.0]])
    parameter.data = torch.zeros_like(gradient)
    parameter.grad = gradient
    measured = measure_grad_norm([parameter]).item()
    assert measured == pytest.approx(gradient.double().norm().item(), rel=1e-7)
    assert measured != pytest.approx(torch.linalg.vector_norm(gradient).item(), rel=1e-7)
