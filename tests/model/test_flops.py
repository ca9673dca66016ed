"""Model FLOPs against torch's count of a model that runs."""

import bitsandbytes
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from workspace import ARCHITECTURES, write_model_config

from qloop.model.flops import (
    Flops,
    build_model_flops,
    count_pairs,
    find_windows,
    linear_flops_per_token,
)

LENGTH = 24


def build(tmp_path, model_type="qwen2", device="cpu", **keys):
    file = write_model_config(tmp_path / model_type, model_type, **keys)
    config = AutoConfig.from_pretrained(file)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def adapt(model, **keys):
    import peft

    model.requires_grad_(False)
    model.enable_input_require_grads()  # or the first layer's inputs need no gradient
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **keys)
    return peft.get_peft_model(model, config)


def run_counted(model) -> tuple[dict[str, int], dict[str, int]]:
    """Torch's count for one document of LENGTH tokens, forward and backward, by operator."""
    ids = torch.arange(LENGTH)[None]
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return tuple(
        {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
        for counter in (forward, backward)
    )


def linear_part(counts: dict[str, int]) -> int:
    return counts.get("aten.mm", 0) + counts.get("aten.addmm", 0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_linear_layers_are_those_that_torch_counts(tmp_path, model_type):
    model = build(tmp_path, model_type)
    forward, backward = run_counted(model)
    ours = linear_flops_per_token(model)
    assert LENGTH * ours.forward == linear_part(forward) > 0
    assert LENGTH * ours.backward == linear_part(backward)


@pytest.mark.parametrize("keys", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "head"])
def test_a_frozen_layer_costs_the_gradient_of_its_input_only(tmp_path, keys):
    model = adapt(build(tmp_path, tie_word_embeddings=False), **keys)
    forward, backward = run_counted(model)
    ours = linear_flops_per_token(model)
    assert LENGTH * ours.forward == linear_part(forward)
    assert LENGTH * ours.backward == linear_part(backward) < 2 * linear_part(forward)


def test_a_tied_head_counts_once_and_a_look_up_nothing(tmp_path):
    tied = build(tmp_path / "a", tie_word_embeddings=True)
    apart = build(tmp_path / "b", tie_word_embeddings=False)
    assert linear_flops_per_token(tied) == linear_flops_per_token(apart)
    alone = linear_flops_per_token(apart.lm_head)
    assert alone == Flops(2 * 32 * 1024, 4 * 32 * 1024)


def test_a_4_bit_layer_has_the_flops_of_its_true_shape():
    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=False).to("cpu")
    assert layer.weight.numel() == 64 * 128 // 2  # two in a byte
    assert linear_flops_per_token(layer) == Flops(2 * 64 * 128, 2 * 64 * 128)


def test_a_model_without_memory_has_the_same_flops(tmp_path):
    assert build_model_flops(build(tmp_path, device="meta")) == build_model_flops(build(tmp_path))


def test_attention_is_the_causal_part_of_what_eager_attention_computes(tmp_path):
    model = build(tmp_path, "gpt2")  # the others multiply matrices for their rotary positions too
    forward, backward = run_counted(model)
    ours = build_model_flops(model).of_attention(np.array([LENGTH]))
    # All 24 x 24 pairs there, 24 x 25 / 2 here.
    assert ours.forward * 24 * 2 == forward["aten.bmm"] * 25
    assert ours.backward * 24 * 2 == backward["aten.bmm"] * 25


def test_documents_cost_the_square_of_their_own_length(tmp_path):
    flops = build_model_flops(build(tmp_path))  # 2 layers of 2 heads of 16
    assert flops.of_attention(np.array([3, 1])).forward == 4 * 2 * 2 * 16 * (6 + 1)


@pytest.mark.parametrize("window", [1, 3, 7, 8, 100])
def test_pairs_are_those_that_can_be_counted_one_by_one(window):
    lengths = [7, 1, 20]
    seen = [min(place + 1, window) for length in lengths for place in range(length)]
    assert count_pairs(np.array(lengths), window) == sum(seen)
    every = [place + 1 for length in lengths for place in range(length)]
    assert count_pairs(np.array(lengths), None) == sum(every)


def test_windows_are_those_of_the_layers(tmp_path):
    assert find_windows(build(tmp_path).config) == {None: 2}
    assert find_windows(build(tmp_path, "mistral").config) == {8: 2}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    mixed = AutoConfig.for_model(
        "gemma2", num_hidden_layers=3, sliding_window=16, layer_types=kinds
    )
    assert find_windows(mixed) == {16: 2, None: 1}


def test_a_window_makes_a_long_document_cheaper_and_no_short_one(tmp_path):
    narrow, wide = (build_model_flops(build(tmp_path, name)) for name in ("mistral", "llama"))
    for length, is_cheaper in ((8, False), (9, True)):
        lengths = np.array([length])
        assert (narrow.of(lengths) < wide.of(lengths)) is is_cheaper


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_what_would_be_counted_wrong_is_not_counted(tmp_path, model_type, keys):
    assert build_model_flops(build(tmp_path, model_type, device="meta", **keys)) is None


def test_a_micro_batch_costs_its_positions_and_its_documents(tmp_path):
    flops = build_model_flops(build(tmp_path))
    lengths = np.array([5, 9, 2])
    whole = flops.of(lengths)
    # Two layers of 2 heads of 16, forward and twice as much backward.
    pairs = 15 + 45 + 3
    assert whole == sum(flops.linear) * 16 + 3 * 2 * 4 * 2 * 16 * pairs
    assert flops.of(np.array([16])) > whole  # one document, more pairs
