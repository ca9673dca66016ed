"""The state of a model: fingerprints and parameter counts."""

import pytest
from tiny_models import both_adapters, build, every_architecture, save_adapters, train_steps

from qloop.model.state import count_parameters, fingerprint_weights

# Fingerprints


@both_adapters
def test_the_same_base_has_the_same_fingerprint(bases, method):
    one, other = build(bases(), method, seed=1), build(bases(), method, seed=2)
    assert fingerprint_weights(one) == fingerprint_weights(other)


@both_adapters
def test_another_base_has_another_fingerprint(bases, method):
    one, other = build(bases(), method), build(bases(seed=1), method)
    assert fingerprint_weights(one) != fingerprint_weights(other)


@both_adapters
def test_a_fine_tuned_base_has_another_fingerprint(bases, tmp_path, method):
    tuned = build(bases())
    train_steps(tuned, 1)
    tuned.save_pretrained(tmp_path)
    one, other = build(bases(), method), build(tmp_path, method)
    assert fingerprint_weights(one) != fingerprint_weights(other)


@both_adapters
def test_training_does_not_change_the_fingerprint(bases, method):
    model = build(bases(), method, modules_to_save=("lm_head",))
    before = fingerprint_weights(model)
    train_steps(model, 2)
    assert fingerprint_weights(model) == before


@both_adapters
@pytest.mark.parametrize("layers", [(), ("lm_head",)], ids=["lora", "modules_to_save"])
def test_a_restored_model_has_the_fingerprint_of_the_saved_one(bases, tmp_path, method, layers):
    model = build(bases(), method, modules_to_save=layers)
    train_steps(model, 1)
    checkpoint = save_adapters(model, tmp_path)
    restored = build(bases(), method, checkpoint=checkpoint, modules_to_save=layers)
    assert fingerprint_weights(restored) == fingerprint_weights(model)


def test_where_nothing_is_frozen_all_models_have_one_fingerprint(bases):
    fingerprints = {fingerprint_weights(build(bases(seed=seed))) for seed in (0, 1)}
    assert len(fingerprints) == 1


def test_a_4_bit_base_with_other_scales_has_another_fingerprint(bases):
    model = build(bases(), "qlora")
    before = fingerprint_weights(model)
    for parameter in model.parameters():
        if hasattr(parameter, "quant_state"):
            parameter.quant_state.state2.absmax.mul_(2)
    assert fingerprint_weights(model) != before


# Counts


def test_parameters_are_counted_by_hand(bases):
    """Qwen2 of width 32: embedding and head, two blocks, the last norm."""
    attention = 2 * (32 * 32) + 2 * (32 * 16) + 32 + 16 + 16  # q and o, k and v, biases of q, k, v
    block = attention + 3 * (32 * 64) + 2 * 32
    expected = 2 * (1024 * 32) + 2 * block + 32
    assert count_parameters(build(bases())) == (expected, expected)


def test_a_weight_shared_by_two_layers_is_counted_once(bases):
    untied, tied = (
        count_parameters(build(bases(tie_word_embeddings=tied)))[0] for tied in (False, True)
    )
    assert untied - tied == 1024 * 32


@every_architecture
def test_a_4_bit_parameter_counts_as_one_whole(bases, architecture):
    lora, qlora = (build(bases(architecture), method) for method in ("lora", "qlora"))
    assert count_parameters(qlora) == count_parameters(lora)


def test_adapters_are_counted_besides_the_base(bases):
    """Rank 4 on q_proj (32 to 32) and k_proj (32 to 16), in two blocks."""
    base, _ = count_parameters(build(bases()))
    model = build(bases(), "lora", lora_rank=4, lora_target_modules=("q_proj", "k_proj"))
    adapters = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    assert count_parameters(model) == (base + adapters, adapters)
