"""The model of a run: built right for each method, from a base, a checkpoint or a seed."""

import bitsandbytes
import pytest
import torch
from references import next_token_loss, predict
from safetensors.torch import load_file
from tiny_models import (
    VOCABULARY,
    assert_equal,
    build,
    change_tensors,
    copy_of,
    draw_row,
    every_architecture,
    every_method,
    layers_with_adapters,
    names_of_unmoved,
    save_adapters,
    train_steps,
    trained_parameters,
)
from workspace import write_model_config

from qloop.errors import CheckpointError
from qloop.model.isolation import check_isolation


def tensors_of(model) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# full


@every_architecture
def test_a_forward_and_backward_pass_gives_every_weight_a_finite_gradient(bases, architecture):
    model = build(bases(architecture))
    loss = next_token_loss(model, draw_row(rows=2))
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_architecture
def test_full_trains_every_parameter_in_fp32(bases, architecture):
    model = build(bases(architecture), precision="bf16")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_base_saved_in_bf16_becomes_fp32_masters_of_the_same_values(bases, tmp_path):
    saved = build(bases()).to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    loaded = build(tmp_path, precision="bf16")
    expected = {name: parameter.float() for name, parameter in saved.named_parameters()}
    assert_equal(dict(loaded.named_parameters()), expected)


@every_architecture
def test_a_saved_model_is_loaded_by_name_bit_by_bit(tmp_path, architecture):
    model = build(write_model_config(tmp_path / "config", architecture))
    model.save_pretrained(tmp_path / "saved")
    loaded = build(tmp_path / "saved", seed=1)
    assert_equal(tensors_of(loaded), tensors_of(model))


# qlora


@every_architecture
def test_qlora_holds_the_linear_layers_of_the_base_in_4_bits(bases, architecture):
    model = build(bases(architecture), "qlora")
    packed = {
        name.split(".")[-3]: parameter
        for name, parameter in model.named_parameters()
        if type(parameter).__name__ == "Params4bit"
    }
    assert set(packed) == layers_with_adapters(model)
    for parameter in packed.values():
        assert parameter.dtype == torch.uint8
        assert parameter.quant_state.quant_type == "nf4"
        assert parameter.quant_state.nested, "quantised twice"
        assert not parameter.requires_grad


@every_architecture
def test_qlora_trains_adapters_in_fp32_and_nothing_else(bases, architecture):
    trained = trained_parameters(build(bases(architecture), "qlora", "bf16"))
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_qlora_computes_in_the_precision_of_the_run(bases, precision):
    model = build(bases(), "qlora", precision)
    types = {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")}
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_4_bits_keep_a_weight_to_about_a_tenth(bases):
    """Sixteen values for each block of 64 weights."""
    weight = build(bases()).model.layers[0].mlp.up_proj.weight
    packed = build(bases(), "qlora").base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    unpacked = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    assert 0.03 < (unpacked - weight).norm() / weight.norm() < 0.2


@every_architecture
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_qlora_learns_after_an_evaluation_as_it_would_have_before(bases, architecture, keys):
    """bitsandbytes repacks 4-bit weights in a forward pass without gradients, and then passes none.

    It does so on CPUs with AVX512-BF16 alone: on others this holds by itself.
    """
    trained = []
    for with_evaluation in (True, False):
        model = build(bases(architecture), "qlora", **keys)
        if with_evaluation:
            model.eval()
            with torch.no_grad():
                predict(model, draw_row(rows=2))
        before = copy_of(trained_parameters(model))
        torch.manual_seed(1)
        train_steps(model, 2)
        assert names_of_unmoved(model, before) == []
        trained.append(copy_of(trained_parameters(model)))
    assert_equal(*trained)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_qlora_moves_every_adapter_with_an_evaluation_between_its_steps(bases, checkpointing):
    model = build(bases(), "qlora", gradient_checkpointing=checkpointing)
    train_steps(model, 1)
    check_isolation(model, VOCABULARY, "fp32")
    model.eval()
    with torch.no_grad():
        predict(model, draw_row())
    before = copy_of(trained_parameters(model))
    train_steps(model, 1)
    assert names_of_unmoved(model, before) == []


# From a checkpoint


def test_full_goes_on_from_a_checkpoint_bit_by_bit(bases, tmp_path):
    model = build(bases())
    train_steps(model, 2)
    model.save_pretrained(tmp_path)
    restored = build(bases(), checkpoint=tmp_path, seed=1)
    assert_equal(trained_parameters(restored), trained_parameters(model))


def test_a_model_from_random_weights_goes_on_from_a_checkpoint(tmp_path):
    file = write_model_config(tmp_path / "config")
    model = build(file)
    train_steps(model, 2)
    model.save_pretrained(tmp_path / "saved")
    restored = build(file, checkpoint=tmp_path / "saved", seed=1)
    assert_equal(trained_parameters(restored), trained_parameters(model))


@every_method
def test_a_restored_model_learns_on_like_the_one_that_was_saved(bases, tmp_path, method):
    model = build(bases(), method, gradient_checkpointing=True)
    train_steps(model, 2)
    save = save_adapters if method != "full" else lambda model, to: model.save_pretrained(to)
    save(model, tmp_path)
    restored = build(bases(), method, checkpoint=tmp_path, gradient_checkpointing=True)
    for each in (model, restored):
        torch.manual_seed(1)
        train_steps(each, 2)
    assert_equal(trained_parameters(restored), trained_parameters(model))


def test_a_checkpoint_that_lacks_a_weight_is_refused(bases, tmp_path):
    build(bases()).save_pretrained(tmp_path)
    change_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first lm_head\.weight"):
        build(bases(), checkpoint=tmp_path)


@pytest.mark.parametrize(("method", "file"), [("full", "model"), ("lora", "adapter_model")])
def test_a_checkpoint_whose_file_was_cut_is_refused(bases, tmp_path, method, file):
    model = build(bases(), method)
    model.save_pretrained(tmp_path)
    weights = tmp_path / f"{file}.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=tmp_path.name):
        build(bases(), method, checkpoint=tmp_path)


@every_method
def test_a_checkpoint_that_is_not_there_is_refused(bases, tmp_path, method):
    with pytest.raises(CheckpointError, match="checkpoint-7"):
        build(bases(), method, checkpoint=tmp_path / "checkpoint-7")


# From a seed


@every_architecture
def test_a_seed_decides_the_weights_of_a_new_model(tmp_path, architecture):
    file = write_model_config(tmp_path, architecture)
    one, same, other = build(file, seed=3), build(file, seed=3), build(file, seed=4)
    assert_equal(dict(one.named_parameters()), dict(same.named_parameters()))
    embeddings = [model.get_input_embeddings().weight for model in (one, other)]
    assert not torch.equal(*embeddings)


def test_new_weights_do_not_depend_on_what_was_drawn_before(tmp_path):
    file = write_model_config(tmp_path)
    torch.manual_seed(1)
    one = build(file)
    torch.rand(7)
    assert_equal(dict(one.named_parameters()), dict(build(file).named_parameters()))
