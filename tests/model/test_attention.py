"""Attention over documents: the block-diagonal reference, without its mask."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, boundaries_of, draw, reference
from workspace import write_model_config

from qloop.config.keys import LoraConfig, ModelConfig
from qloop.data.batches import MicroBatch
from qloop.errors import ConfigError
from qloop.model.attention import (
    DOCUMENTS,
    AttentionChoice,
    _attend_by_torch,
    attend_to_documents,
    attention_inputs,
    choose,
    own_attention,
)
from qloop.model.build import build_model
from qloop.model.isolation import Isolation, set_attention
from qloop.model.loss import compute_logits

CPU = torch.device("cpu")
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
heads = pytest.mark.parametrize(("num_heads", "key_heads"), [(2, 2), (4, 2), (6, 1)])
windows = pytest.mark.parametrize("window", [None, 1, 4, 12, 100])


@layouts
@heads
@windows
def test_it_is_the_block_diagonal_reference_in_value_and_gradient(
    layout, num_heads, key_heads, window
):
    inputs = draw(layout, num_heads, key_heads)
    attended, _ = attend_to_documents(
        torch.nn.Module(), *inputs, None,
        sliding_window=window, cu_seq_lens_q=boundaries_of(layout), max_length_q=12,
    )  # fmt: skip
    expected = reference(layout, *inputs, window)
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=2e-6)
    slopes = torch.randn(attended.shape, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad(attended, inputs, slopes)
    wanted = torch.autograd.grad(expected, inputs, slopes.double())
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_scale_of_the_layers_own_is_used():
    inputs = draw([[0, 5, 12]], 2, 2)
    boundaries = boundaries_of([[0, 5, 12]])
    scaled, _ = attend_to_documents(
        torch.nn.Module(), *inputs, None, scaling=0.1, cu_seq_lens_q=boundaries
    )
    expected = F.scaled_dot_product_attention(
        *(tensor[:, :, 5:] for tensor in inputs), is_causal=True, scale=0.1
    )
    torch.testing.assert_close(scaled[:, 5:], expected.transpose(1, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_it_does_not_do_is_an_error(name):
    inputs = draw([[0, 12]], 2, 2)
    options = {"cu_seq_lens_q": boundaries_of([[0, 12]]), name: 5.0}
    with pytest.raises(ValueError, match=name):
        attend_to_documents(torch.nn.Module(), *inputs, None, **options)


def test_a_mask_dropout_or_no_boundaries_are_errors():
    inputs = draw([[0, 12]], 2, 2)
    boundaries = boundaries_of([[0, 12]])
    for mask, options in (
        (torch.ones(1, 1, 12, 12), {"cu_seq_lens_q": boundaries}),
        (None, {"cu_seq_lens_q": boundaries, "dropout": 0.1}),
        (None, {}),
    ):
        with pytest.raises(ValueError, match="supports no mask"):
            attend_to_documents(torch.nn.Module(), *inputs, mask, **options)


def test_torch_finds_the_operators_well_defined():
    inputs = draw([[0, 5, 12]], 4, 2)
    torch.library.opcheck(
        torch.ops.qloop.attend.default, (*inputs, boundaries_of([[0, 5, 12]]), 0.3, 0)
    )


# What a GPU is asked, without one


def attend_in_flat(
    query, key, value, starts, key_starts, max_length, max_key_length,
    *, scale, window_size, enable_gqa=True,
):  # fmt: skip
    """What `varlen_attn` promises, a query at a time."""
    assert torch.equal(starts, key_starts)
    assert max_length == max_key_length >= max(end - begin for begin, end in pairwise(starts))
    assert enable_gqa or query.shape[1] == key.shape[1]
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))
    rows = []
    before, behind = window_size
    for begin, end in pairwise(starts.tolist()):
        for here in range(begin, end):
            first = begin if before < 0 else max(begin, here - before)
            last = end if behind < 0 else min(end, here + behind + 1)
            scores = torch.einsum("hd,khd->hk", query[here], key[first:last]) * scale
            rows.append(torch.einsum("hk,khd->hd", scores.softmax(dim=-1), value[first:last]))
    return torch.stack(rows)


@layouts
@heads
@windows
def test_torchs_kernel_is_asked_for_the_same(monkeypatch, layout, num_heads, key_heads, window):
    monkeypatch.setattr("qloop.model.attention.varlen_attn", attend_in_flat)
    inputs = draw(layout, num_heads, key_heads)
    scale = inputs[0].shape[-1] ** -0.5
    attended = _attend_by_torch(inputs, boundaries_of(layout), 12, scale, window or 0)
    expected = reference(layout, *inputs, window)
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=2e-6)


def test_torchs_kernel_takes_what_it_is_given():
    """Its shapes alone, as it has no kernel for a CPU."""
    inputs = [
        tensor.detach().to("meta").requires_grad_() for tensor in draw([[0, 5, 12]] * 2, 4, 2)
    ]
    boundaries = boundaries_of([[0, 5, 12]] * 2).to("meta")
    attended = _attend_by_torch(inputs, boundaries, 12, 0.3, 4)
    assert attended.shape == (2, 12, 4, 8)
    attended.sum().backward()
    assert [tensor.grad.shape for tensor in inputs] == [tensor.shape for tensor in inputs]


# A model's attention


def build(folder, model_type="qwen2", **keys):
    file = write_model_config(folder, model_type, **keys)
    config = ModelConfig(model_config_file=file, gradient_checkpointing=False)
    return build_model(config, LoraConfig(), "fp32", CPU, seed=0)


def choose_and_set(model, wanted: str) -> tuple[AttentionChoice, Isolation]:
    choice = choose(wanted, model, device_type="cpu", precision="fp32")
    is_wanted = wanted == DOCUMENTS
    return set_attention(model, choice, is_wanted=is_wanted, precision="fp32", vocabulary_size=1024)


def test_auto_chooses_documents_and_a_name_is_obeyed(tmp_path):
    for wanted, chosen in (("auto", DOCUMENTS), (DOCUMENTS, DOCUMENTS), ("sdpa", "sdpa")):
        model = build(tmp_path)
        choice, isolation = choose_and_set(model, wanted)
        assert choice.name == chosen == model.config._attn_implementation
        assert isolation.swapped <= 1e-6


@pytest.mark.parametrize(
    ("model_type", "keys", "reason"),
    [
        ("gpt2", {}, "drops attention weights"),
        ("gemma2", {"head_dim": 16}, "softcap"),
        (
            "gpt_neo",
            {"num_layers": 2, "attention_types": [[["global"], 2]]},
            "no attention but its own",
        ),
    ],
)
def test_a_model_that_asks_for_more_keeps_its_own_and_says_why(tmp_path, model_type, keys, reason):
    model = build(tmp_path, model_type, **keys)
    own = model.config._attn_implementation
    choice, _ = choose_and_set(model, "auto")
    assert model.config._attn_implementation == own == choice.name
    assert reason in choice.reason
    with pytest.raises(ConfigError, match=f"attention: documents cannot be used here.*{reason}"):
        choose_and_set(model, DOCUMENTS)


def test_a_model_that_fails_the_check_keeps_its_own_unless_documents_is_wanted(tmp_path):
    """Its layer passes an argument that changes the result, which its config does not show."""
    model = build(tmp_path)
    attend = model.model.layers[0].self_attn.forward

    def with_sinks(*values, **keys):
        return attend(*values, s_aux=torch.zeros(2), **keys)

    model.model.layers[0].self_attn.forward = with_sinks
    choice, isolation = choose_and_set(model, "auto")
    assert choice.name == model.config._attn_implementation == "sdpa"
    assert "s_aux" in choice.reason
    assert isolation.swapped <= 1e-6
    with pytest.raises(ConfigError, match=r"attention: documents cannot be used here.*s_aux"):
        choose_and_set(model, DOCUMENTS)


def test_a_gpu_without_bf16_and_other_devices_keep_their_own(tmp_path):
    model = build(tmp_path)
    assert choose("auto", model, device_type="cuda", precision="bf16") == (DOCUMENTS, "")
    for device_type, reason in (("cuda", "bf16"), ("mps", "mps")):
        choice = choose("auto", model, device_type=device_type, precision="fp32")
        assert choice.name == "sdpa"
        assert reason in choice.reason


def test_generating_goes_by_the_models_own_attention_and_back(tmp_path):
    model = build(tmp_path).eval()
    prompt = torch.arange(20)[None]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **options)
    model.set_attn_implementation(DOCUMENTS)
    with own_attention(model):
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model.generate(prompt, **options), expected)
    assert model.config._attn_implementation == DOCUMENTS


def test_a_saved_config_does_not_name_it(tmp_path):
    model = build(tmp_path / "config")
    model.set_attn_implementation(DOCUMENTS)
    model.config.save_pretrained(tmp_path / "saved")
    assert DOCUMENTS not in (tmp_path / "saved/config.json").read_text()


def test_boundaries_go_only_to_those_who_ask(tmp_path):
    model = build(tmp_path)
    row = MicroBatch(*[torch.arange(6)[None] % 3] * 3)
    assert attention_inputs(model, row) == {}
    model.set_attn_implementation(DOCUMENTS)
    assert attention_inputs(model, row)["cu_seq_lens_q"].tolist() == [0, 3, 6]
    assert compute_logits(model, row).shape == (1, 6, 1024)
