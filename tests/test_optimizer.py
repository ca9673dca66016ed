"""The optimizers: which updates and decays what, the state of each, and one update by hand."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from workspace import ARCHITECTURES, write_model_config

from qloop.config.keys import LoraConfig, ModelConfig, OptimizerConfig
from qloop.errors import ConfigError
from qloop.model.build import build_model
from qloop.optimizer import (
    Optimizers,
    build_optimizer,
    clip_gradients,
    count_state_bytes,
    measure_grad_norm,
    moments_of,
    set_learning_rate,
    split_by_optimizer,
    split_for_decay,
)

CPU = torch.device("cpu")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

# By name: Qwen's and GPT-2's norms, any bias, embeddings of tokens and of positions.
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


def build_linear(**keys) -> tuple[torch.nn.Linear, Optimizers]:
    """A weight of 2 that decays and a bias of -1 that does not."""
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(-1.0)
    return model, build_optimizer(model, OptimizerConfig(**keys))


def update(model: torch.nn.Linear, optimizer: Optimizers, gradient: float) -> None:
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


def test_embeddings_trained_with_adapters_do_not_decay_and_an_untied_head_does(tmp_path):
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
    """Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2: decay apart from the moments."""
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


def test_the_fused_update_is_that_of_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 32, generator=generator)
    plain = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW(
        [plain], lr=0.1, betas=(0.9, 0.95), weight_decay=0.01, fused=False, foreach=False
    )
    ours, optimizer = build_matrix(start, "adamw")
    for _ in range(5):
        plain.grad = torch.randn(64, 32, generator=generator)
        ours.weight.grad = plain.grad.clone()
        theirs.step()
        optimizer.step()
    assert (ours.weight - plain).abs().max() < 1e-6
    assert (plain - start).abs().max() > 0.1


# Which optimizer updates what

DEMO = Path(__file__).parent.parent / "qloop/demo/model/config.json"
NORMS = ("input", "post_attention")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Decoder(torch.nn.Module):
    """One layer of one matrix, as transformers marks layers."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.layer = GradientCheckpointingLayer()
        self.layer.weight = torch.nn.Parameter(weight.clone())

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.layer.weight


def build_matrix(
    weight: torch.Tensor, optimizer: str, rate: float = 0.1
) -> tuple[Decoder, Optimizers]:
    """A model of one matrix, with its optimizer at a rate."""
    model = Decoder(weight)
    built = build_optimizer(model, OptimizerConfig(optimizer=optimizer))
    set_learning_rate(built, rate)
    return model, built


def build_demo(folder: Path, **keys) -> torch.nn.Module:
    """The demo's model on the device meta: names and shapes without values."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(DEMO.read_text()), **keys}))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_updates_the_matrices_of_the_layers_and_adamw_all_else(tmp_path, tied):
    groups = split_by_optimizer(build_demo(tmp_path, tie_word_embeddings=tied), "muon")
    layers = [f"model.layers.{number}." for number in range(4)]
    blocks = {name: "self_attn" if name in MATRICES[:4] else "mlp" for name in MATRICES}
    assert set(groups["muon"]) == {
        f"{layer}{blocks[name]}.{name}.weight" for layer in layers for name in MATRICES
    }
    assert set(groups["adamw"]) == {
        *("model.embed_tokens.weight", "model.norm.weight"),
        *([] if tied else ["lm_head.weight"]),
        *(f"{layer}self_attn.{name}.bias" for layer in layers for name in MATRICES[:3]),
        *(f"{layer}{name}_layernorm.weight" for layer in layers for name in NORMS),
    }


def test_eight_bits_keep_the_matrices_and_an_untied_head_but_no_embedding(tmp_path):
    groups = split_by_optimizer(build_demo(tmp_path, tie_word_embeddings=False), "adamw_8bit")
    assert len(groups["adamw_8bit"]) == 4 * 7 + 1
    assert "lm_head.weight" in groups["adamw_8bit"]
    assert "model.embed_tokens.weight" in groups["adamw"]
    assert all(name.endswith((*SPARED, "embed_tokens.weight")) for name in groups["adamw"])


def test_small_matrices_are_worth_no_eight_bits(tmp_path):
    """16 x 32 values for the keys, 32 x 1024 for the head: from 4096 on."""
    groups = split_by_optimizer(build(tmp_path, tie_word_embeddings=False), "adamw_8bit")
    assert set(groups["adamw_8bit"]) == {"lm_head.weight"}


def test_large_tensors_are_paged_and_an_embedding_in_32_bits(tmp_path):
    model = build_demo(tmp_path)
    groups = split_by_optimizer(model, "paged_adamw_8bit")
    assert {kind: len(parameters) for kind, parameters in groups.items()} == {
        "paged_adamw_8bit": 28, "paged_adamw": 1, "adamw": 21,
    }  # fmt: skip
    assert set(groups["paged_adamw"]) == {"model.embed_tokens.weight"}
    sizes = [p.numel() for p in split_by_optimizer(model, "paged_adamw")["adamw"].values()]
    assert max(sizes) < 100_000


@every_architecture
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_trained_parameter_has_exactly_one_optimizer(tmp_path, architecture, optimizer):
    model = build(tmp_path, architecture)
    groups = split_by_optimizer(model, optimizer)
    names = [name for parameters in groups.values() for name in parameters]
    assert sorted(names) == sorted(trained_names(model))
    built = build_optimizer(model, OptimizerConfig(optimizer=optimizer))
    assert built.kinds == {p: kind for kind, group in groups.items() for p in group.values()}


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon"])
def test_the_same_weights_decay_under_every_optimizer(tmp_path, optimizer):
    model = build(tmp_path, hidden_size=64, tie_word_embeddings=False)
    built = build_optimizer(model, OptimizerConfig(optimizer=optimizer, weight_decay=0.05))
    decays = {p for g in built.param_groups if g["weight_decay"] == 0.05 for p in g["params"]}
    spares = {p for g in built.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    decayed, spared = split_for_decay(model)
    assert (decays, spares) == (set(decayed.values()), set(spared.values()))
    assert len(built.each) == 2


def test_one_rate_is_set_for_all_optimizers(tmp_path):
    built = build_optimizer(build(tmp_path), OptimizerConfig(optimizer="muon"))
    set_learning_rate(built, 3e-4)
    assert [group["lr"] for group in built.param_groups] == [3e-4] * 4


def test_a_model_that_does_not_say_what_its_layers_are_is_refused_by_muon_alone():
    model = torch.nn.Linear(64, 64)
    with pytest.raises(ConfigError, match=r"optimizer: muon .* Linear does not say .* use adamw"):
        build_optimizer(model, OptimizerConfig(optimizer="muon"))
    assert len(build_optimizer(model, OptimizerConfig(optimizer="adamw_8bit")).each) == 2


def test_a_matrix_of_one_row_is_a_vector_to_muon():
    groups = split_by_optimizer(Decoder(torch.zeros(2, 64)), "muon")
    assert list(groups) == ["muon"]
    with pytest.raises(ConfigError, match="does not say what its layers are"):
        split_by_optimizer(Decoder(torch.zeros(1, 64)), "muon")


def test_gradients_of_all_optimizers_are_dropped(tmp_path):
    model = build(tmp_path)
    built = build_optimizer(model, OptimizerConfig(optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.zero_grad()
    assert [parameter.grad for parameter in model.parameters()] == [None] * len(built.kinds)


# Muon


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48)])
def test_muons_update_is_nearly_orthogonal_and_of_the_size_of_adamws(shape):
    """Its singular values are nearly equal, whatever the gradient's are: here 1 to 1000."""
    generator = torch.Generator().manual_seed(0)
    rank = min(shape)
    left, _ = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator))
    gradient = left * torch.logspace(0, 3, rank) @ right.T
    model, optimizer = build_matrix(torch.zeros(shape), "muon", rate=1.0)
    model.weight.grad = gradient
    optimizer.step()
    values = torch.linalg.svdvals(model.weight.detach()) / (0.2 * math.sqrt(max(shape)))
    assert values.max() < 1.3
    # Five iterations lift values below a hundredth of the norm only so far.
    large = torch.logspace(0, 3, rank).flip(0) > 30
    assert values[large].min() > 0.6
    assert (model.weight * gradient).sum() < 0, "downhill"


def test_muons_update_of_an_even_gradient_has_a_root_mean_square_of_a_fifth_of_the_rate():
    gradient = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    model, optimizer = build_matrix(torch.zeros(64, 32), "muon", rate=0.1)
    model.weight.grad = gradient
    optimizer.step()
    assert model.weight.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.2)


def test_muon_decays_by_the_rate_itself():
    """With a gradient of 0 a weight loses rate * weight_decay of itself: 0.1 * 0.01."""
    model, optimizer = build_matrix(torch.ones(8, 4), "muon", rate=0.1)
    model.weight.grad = torch.zeros(8, 4)
    optimizer.step()
    assert torch.allclose(model.weight, torch.full((8, 4), 0.999))


# 8 bits


def test_eight_bit_updates_are_near_those_of_32_bits():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator)
    (exact, one), (rounded, other) = (build_matrix(start, kind) for kind in OPTIMIZERS[:2])
    for _ in range(5):
        gradient = torch.randn(64, 128, generator=generator)
        for model, optimizer in ((exact, one), (rounded, other)):
            model.weight.grad = gradient.clone()
            optimizer.step()
    moved = (exact.weight - start).norm()
    apart = (rounded.weight - exact.weight).norm()
    assert 0 < apart < 0.1 * moved


# State


def take_steps(model: torch.nn.Module, built: Optimizers, seed: int = 0) -> None:
    """Two steps on gradients of a seed."""
    generator = torch.Generator().manual_seed(seed)
    set_learning_rate(built, 1e-2)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        built.step()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
def test_the_state_read_is_all_that_an_optimizer_has_and_of_the_counted_size(tmp_path, optimizer):
    model = build(tmp_path, hidden_size=64, tie_word_embeddings=False)
    built = build_optimizer(model, OptimizerConfig(optimizer=optimizer))
    take_steps(model, built)
    size = 0
    for parameter, kind in built.kinds.items():
        kept, live = built.read_state(parameter), built.state[parameter]
        assert set(live) - {"qmap1", "qmap2"} == set(kept)
        expected = moments_of(kind, parameter.shape)
        assert {n: (t.dtype, t.shape) for n, t in kept.items()} == {
            n: (t.dtype, t.shape) for n, t in expected.items()
        }
        assert all(kept[name].ne(0).any() for name in kept)
        size += sum(tensor.nbytes for tensor in kept.values())
    assert size == count_state_bytes(model, optimizer)
    assert size == count_state_bytes(model.to("meta"), optimizer)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adamw", 8.00),
        ("paged_adamw", 8.00),
        ("adamw_8bit", 2 + 2 * 4 / 256),
        ("paged_adamw_8bit", 2 + 2 * 4 / 256),
        ("muon", 4.00),
    ],
)
def test_the_bytes_of_a_parameter_of_a_large_matrix(optimizer, expected):
    with torch.device("meta"):
        model = Decoder(torch.zeros(1024, 1024))
    assert count_state_bytes(model, optimizer) / 1024**2 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
def test_an_optimizer_with_the_state_of_another_goes_on_like_it(tmp_path, optimizer):
    keys = {"hidden_size": 64, "tie_word_embeddings": False}
    one, other = (build(tmp_path, **keys) for _ in range(2))
    first, second = (
        build_optimizer(model, OptimizerConfig(optimizer=optimizer)) for model in (one, other)
    )
    take_steps(one, first)
    other.load_state_dict(one.state_dict())
    for (_, mine), (_, theirs) in zip(
        other.named_parameters(), one.named_parameters(), strict=True
    ):
        kept = first.read_state(theirs)
        second.put_state(mine, {name: tensor.clone() for name, tensor in kept.items()})
    take_steps(one, first, seed=1)
    take_steps(other, second, seed=1)
    for mine, theirs in zip(other.parameters(), one.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_state_put_into_paged_memory_is_read_again(optimizer):
    """As far as a CPU goes, where bitsandbytes takes other memory instead."""
    model, built = build_matrix(torch.zeros(512, 256), optimizer)
    [kind] = built.kinds.values()
    assert kind == optimizer
    generator = torch.Generator().manual_seed(0)
    moments = {
        name: (torch.rand(blank.shape, generator=generator) * 200 + 1).to(blank.dtype)
        for name, blank in moments_of(kind, (512, 256)).items()
    }
    moments["step"] = torch.tensor(7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built.put_state(model.weight, moments)
    read = built.read_state(model.weight)
    assert read.keys() == moments.keys()
    assert all(torch.equal(read[name], moments[name]) for name in moments)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit"])
def test_a_paged_optimizer_goes_on_from_its_state(optimizer):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    start = torch.randn(512, 256, device="cuda")
    one, first = build_matrix(start, optimizer)
    take_steps_on_gpu(one, first)
    other, second = build_matrix(one.weight.detach(), optimizer)
    kept = {name: tensor.clone() for name, tensor in first.read_state(one.weight).items()}
    second.put_state(other.weight, kept)
    assert second.state[other.weight]["state1"].is_paged
    for model, built in ((one, first), (other, second)):
        take_steps_on_gpu(model, built)
    assert torch.equal(one.weight, other.weight)


def take_steps_on_gpu(model: Decoder, built: Optimizers) -> None:
    for number in range(2):
        model.weight.grad = torch.full_like(model.weight, 0.5 + number)
        built.step()


def test_a_parameter_without_a_gradient_has_the_state_of_the_start():
    model, built = build_matrix(torch.zeros(64, 64), "adamw_8bit")
    kept = built.read_state(model.weight)
    assert set(kept) == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert not any(tensor.any() for tensor in kept.values())


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
