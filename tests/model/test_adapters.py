"""Adapters: which layers have them, what they train, and how checkpoints bring them back."""

import pytest
import torch
import transformers
from references import next_token_loss
from safetensors.torch import load_file
from tiny_models import (
    assert_equal,
    both_adapters,
    build,
    change_tensors,
    copy_of,
    cut,
    draw_row,
    every_architecture,
    layers_with_adapters,
    logits_of,
    names_of_unmoved,
    save_adapters,
    train_steps,
    trained_parameters,
)

from qloop.errors import CheckpointError, ConfigError
from qloop.model.loss import compute_logits

# LoRA


@every_architecture
def test_lora_trains_adapters_in_fp32_and_nothing_else(bases, architecture):
    model = build(bases(architecture), "lora", "bf16")
    trained = trained_parameters(model)
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = [p for name, p in model.named_parameters() if name not in trained]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}


@every_architecture
def test_lora_starts_equal_to_its_base(bases, architecture):
    row = draw_row()
    base, model = build(bases(architecture)), build(bases(architecture), "lora")
    assert torch.equal(logits_of(model, row), logits_of(base, row))


@every_architecture
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_adapter_has_moved_after_two_steps(bases, architecture, checkpointing):
    model = build(bases(architecture), "lora", gradient_checkpointing=checkpointing)
    before = copy_of(trained_parameters(model))
    train_steps(model, 2)
    assert names_of_unmoved(model, before) == []


@every_architecture
def test_every_linear_layer_but_the_head_has_an_adapter(bases, architecture):
    model = build(bases(architecture), "lora")
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    base = build(bases(architecture))
    linear = {name.split(".")[-1] for name, m in base.named_modules() if isinstance(m, kinds)}
    assert layers_with_adapters(model) == linear - {"lm_head"}


def test_training_adapters_leaves_the_base_alone(bases):
    model = build(bases(), "lora")
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = copy_of(frozen)
    train_steps(model, 2)
    assert_equal(frozen, before)
    assert all(parameter.grad is None for parameter in frozen.values())


def test_layers_get_adapters_by_name(bases):
    model = build(bases(), "lora", lora_target_modules=("q_proj", "v_proj"))
    assert layers_with_adapters(model) == {"q_proj", "v_proj"}


def test_an_adapter_has_the_rank_of_the_config(bases):
    model = build(bases(), "lora", lora_rank=3, lora_target_modules=("q_proj",))
    shapes = {tuple(parameter.shape) for parameter in trained_parameters(model).values()}
    assert shapes == {(3, 32), (32, 3)}


def test_dropout_stands_before_each_adapter_in_training_alone(bases):
    model = build(bases(), "lora", lora_dropout=0.25)
    rates = {m.p for name, m in model.named_modules() if name.endswith("lora_dropout.default")}
    assert rates == {0.25}
    train_steps(model, 1)
    torch.manual_seed(1)
    dropped = compute_logits(model.train(), draw_row())
    kept = [logits_of(model, draw_row()) for _ in range(2)]
    assert torch.equal(*kept)
    assert not torch.equal(dropped, kept[0])


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.0), (True, 8.0)])
def test_adapters_are_scaled_by_alpha_over_rank_or_over_its_root(bases, use_rslora, scale):
    """alpha 32 and rank 16: 32 / 16, or 32 / 4."""
    model = build(bases(), "lora", use_rslora=use_rslora, lora_rank=16, lora_alpha=32).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    up.data.normal_()
    x = torch.randn(5, 32)
    added = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(added, scale * x @ down.T @ up.T, rtol=1e-4, atol=1e-4)


@both_adapters
def test_dora_trains_magnitudes_in_fp32_and_all_of_it_moves(bases, method):
    model = build(bases(), method, use_dora=True, gradient_checkpointing=True)
    trained = trained_parameters(model)
    magnitudes = [name for name in trained if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 14, "seven layers in each of two blocks"
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    before = copy_of(trained)
    train_steps(model, 2)
    assert names_of_unmoved(model, before) == []


@both_adapters
def test_dora_starts_equal_to_its_base(bases, method):
    """But for rounding: it takes the weights apart and puts them together again."""
    model, row = build(bases(), method, use_dora=True), draw_row()
    with model.disable_adapter():
        expected = logits_of(model, row)
    limit = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(logits_of(model, row), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("layers", [("w_pack",), ("q_proj", "w_pack")])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(bases, layers):
    with pytest.raises(ConfigError, match=r"lora_target_modules: .*w_pack") as error:
        build(bases(), "lora", lora_target_modules=layers)
    for layer in ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"):
        assert layer in str(error.value)


def test_a_layer_that_can_have_no_adapter_is_refused(bases):
    with pytest.raises(ConfigError, match="lora_target_modules: input_layernorm"):
        build(bases(), "lora", lora_target_modules=("input_layernorm",))


# Layers trained whole


@both_adapters
def test_layers_trained_whole_are_fp32_though_the_base_is_bf16(bases, method):
    model = build(bases(), method, "bf16", modules_to_save=("lm_head",))
    saved = [p for name, p in trained_parameters(model).items() if "modules_to_save" in name]
    assert [parameter.dtype for parameter in saved] == [torch.float32]
    head = model.base_model.model.lm_head
    assert head.original_module.weight.dtype == torch.bfloat16
    assert not head.original_module.weight.requires_grad


def test_layers_trained_whole_get_a_gradient_under_autocast(bases):
    model = build(bases(), "lora", "bf16", modules_to_save=("lm_head",))
    row = cut(draw_row(), slice(5))
    with torch.autocast("cpu", torch.bfloat16):
        next_token_loss(model, row).backward()
    gradient = model.base_model.model.lm_head.modules_to_save["default"].weight.grad
    assert gradient.dtype == torch.float32
    assert (gradient != 0).any()


@both_adapters
def test_layers_trained_whole_move(bases, method):
    model = build(bases(), method, modules_to_save=("lm_head", "embed_tokens"))
    before = copy_of(trained_parameters(model))
    assert len([name for name in before if "modules_to_save" in name]) == 2
    train_steps(model, 2)
    assert names_of_unmoved(model, before) == []


@both_adapters
@pytest.mark.parametrize("key", ["modules_to_save", "lora_target_modules"])
@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_tied_embeddings_are_neither_separated_nor_adapted(bases, method, key, layer):
    """An adapter, merged, would change both ends of the model; trained, it changed one."""
    with pytest.raises(ConfigError, match=rf"{key}: .*ties its input and output"):
        build(bases(tie_word_embeddings=True), method, **{key: (layer,)})


def test_other_layers_of_a_tied_model_can_be_trained_whole(bases):
    model = build(bases(tie_word_embeddings=True), "lora", modules_to_save=("norm",))
    assert any("norm.modules_to_save" in name for name in trained_parameters(model))


@pytest.mark.parametrize(("method", "layer"), [("lora", "w_head"), ("qlora", "gate_proj")])
def test_a_layer_that_does_not_exist_or_has_4_bits_cannot_be_trained_whole(bases, method, layer):
    with pytest.raises(ConfigError, match=rf"modules_to_save: .*{layer}"):
        build(bases(), method, modules_to_save=(layer,))


# From a checkpoint, and from a seed


@both_adapters
@pytest.mark.parametrize(
    "keys",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ("lm_head",)}],
    ids=["lora", "dora", "rslora", "modules_to_save"],
)
def test_adapters_go_on_from_a_checkpoint_bit_by_bit(bases, tmp_path, method, keys):
    model = build(bases(), method, **keys)
    train_steps(model, 2)
    restored = build(bases(), method, checkpoint=save_adapters(model, tmp_path), seed=1, **keys)
    assert_equal(trained_parameters(restored), trained_parameters(model))
    row = draw_row()
    assert torch.equal(logits_of(restored, row), logits_of(model, row))


@both_adapters
@pytest.mark.parametrize("keys", [{}, {"modules_to_save": ("lm_head",)}], ids=["lora", "whole"])
def test_fp32_masters_of_a_bf16_base_lose_no_bit_in_a_checkpoint(bases, tmp_path, method, keys):
    model = build(bases(), method, "bf16", **keys)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model).values():
        parameter.data.normal_(generator=generator)
    restored = build(bases(), method, "bf16", checkpoint=save_adapters(model, tmp_path), **keys)
    assert_equal(trained_parameters(restored), trained_parameters(model))


@pytest.mark.parametrize("shape", [None, (63, 16)])
def test_a_checkpoint_with_an_adapter_missing_or_of_another_shape_is_refused(
    bases, tmp_path, shape
):
    save_adapters(build(bases(), "lora"), tmp_path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        if shape:
            tensors[name] = torch.zeros(shape)

    change_tensors(tmp_path / "adapter_model.safetensors", change)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        build(bases(), "lora", checkpoint=tmp_path)


def test_a_checkpoint_with_an_adapter_that_the_model_has_not_is_refused(bases, tmp_path):
    save_adapters(build(bases(), "lora"), tmp_path)
    with pytest.raises(CheckpointError, match="holds 24 that the model lacks"):
        build(bases(), "lora", checkpoint=tmp_path, lora_target_modules=("q_proj",))


def test_an_adapter_that_is_pickled_is_refused(bases, tmp_path):
    save_adapters(build(bases(), "lora"), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match=tmp_path.name):
        build(bases(), "lora", checkpoint=tmp_path)


@both_adapters
def test_a_seed_decides_the_adapters(bases, method):
    one, same, other = (trained_parameters(build(bases(), method, seed=s)) for s in (3, 3, 4))
    assert_equal(one, same)
    drawn = [name for name in one if "lora_A" in name]
    assert len(drawn) == 14
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
