"""Packed documents: they do not see each other, and models that let them are refused."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from references import next_token_loss
from tiny_models import (
    LENGTHS,
    VOCABULARY,
    assert_equal,
    attending,
    both_adapters,
    build,
    cut,
    draw_row,
    every_architecture,
    logits_of,
    train_steps,
)
from workspace import ARCHITECTURES, write_model_config

from qloop.data.batches import MicroBatch
from qloop.errors import ConfigError
from qloop.model.isolation import check_isolation, measure_isolation

WINDOWED = [name for name, keys in ARCHITECTURES.items() if "sliding_window" in keys]

# Keys of a tiny model of a kind that keeps a state over the row.
HYBRID = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "head_dim": 16,
}

both_attentions = pytest.mark.parametrize("attention", ["documents", "sdpa"])


def sum_losses_alone(model, row: MicroBatch) -> float:
    """Runs each document by itself, as anyone would; transformers makes the positions."""
    total = 0.0
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for begin, end in pairwise(ends):
        logits = model(input_ids=row.input_ids[:, begin:end], use_cache=False).logits[0]
        total += F.cross_entropy(logits, row.labels[0, begin:end], reduction="sum").item()
    return total


# Every architecture


@every_architecture
@both_attentions
def test_documents_in_a_row_do_not_see_each_other(tmp_path, architecture, attention):
    model = attending(build(write_model_config(tmp_path, architecture)), attention)
    measured = measure_isolation(model, VOCABULARY, "fp32")
    assert measured.swapped <= 1e-6
    assert measured.alone < 1e-5


@every_architecture
@both_attentions
def test_large_weights_do_not_make_them_see_each_other(bases, architecture, attention):
    model = attending(build(bases(architecture)), attention)
    measured = check_isolation(model, VOCABULARY, "fp32")
    assert measured.swapped <= 1e-6
    assert measured.alone < 1e-5


@every_architecture
@both_attentions
def test_the_packed_loss_is_the_sum_of_the_documents_losses_under_eager_attention(
    bases, architecture, attention
):
    eager, model = build(bases(architecture), attention="eager"), build(bases(architecture))
    assert eager.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"
    attending(model, attention)
    row = draw_row()
    packed = next_token_loss(model, row).item()
    assert packed == pytest.approx(sum_losses_alone(eager, row), rel=1e-5)


@every_architecture
def test_that_comparison_would_see_documents_run_together(bases, architecture):
    model, row = build(bases(architecture)), draw_row()
    together = MicroBatch(row.input_ids, row.labels, torch.arange(sum(LENGTHS))[None])
    packed = next_token_loss(model, row).item()
    assert next_token_loss(model, together).item() != pytest.approx(packed, rel=1e-4)


@pytest.mark.parametrize("architecture", WINDOWED)
@both_attentions
def test_that_comparison_would_see_a_lost_sliding_window(bases, architecture, attention):
    model, row = attending(build(bases(architecture)), attention), draw_row()
    windowless = bases(architecture, sliding_window=None)
    assert_equal(dict(build(windowless).named_parameters()), dict(model.named_parameters()))
    packed = next_token_loss(model, row).item()
    assert next_token_loss(build(windowless), row).item() != pytest.approx(packed, rel=1e-3)


@every_architecture
@both_attentions
def test_packing_leaves_the_gradient_as_it_is(bases, architecture, attention):
    packed, alone = build(bases(architecture)), build(bases(architecture), attention="eager")
    attending(packed, attention)
    row, begin = draw_row(), 0
    next_token_loss(packed, row).backward()
    for length in LENGTHS:
        next_token_loss(alone, cut(row, slice(begin, begin + length))).backward()
        begin += length
    for mine, other in zip(packed.parameters(), alone.parameters(), strict=True):
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4 * scale)


# What is refused and what is not


@pytest.mark.parametrize(("architecture", "keys"), [("qwen3_next", HYBRID), ("bloom", {})])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_whose_documents_see_each_other_is_refused(tmp_path, architecture, keys, precision):
    model = build(write_model_config(tmp_path, architecture, initializer_range=0.2, **keys))
    with pytest.raises(ConfigError, match=f"{architecture} lets packed documents see each other"):
        check_isolation(model, VOCABULARY, precision)


@pytest.mark.parametrize(
    "trap",
    [
        {"attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.int64), "use_cache": False},
        {"use_cache": True},
        {},
    ],
    ids=["mask", "cache", "transformers' default"],
)
def test_a_mask_or_a_cache_makes_documents_see_each_other_and_no_error_tells(bases, trap):
    """The reason why `compute_logits` passes neither; the last document has 7 tokens."""
    model, row = build(bases()), draw_row()
    alone = logits_of(model, cut(row, slice(-7, None)))
    ours = logits_of(model, row)[:, -7:]
    with torch.no_grad():
        trapped = model(input_ids=row.input_ids, position_ids=row.position_ids, **trap)
    assert (ours - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (trapped.logits[:, -7:] - alone).abs().max() > 0.1 * alone.abs().max()


@every_architecture
def test_models_that_keep_documents_apart_are_taken_in_bf16_too(bases, architecture):
    """Where other kernels round otherwise: alone, logits may move in the third digit."""
    check_isolation(build(bases(architecture)), VOCABULARY, "bf16")


class Neighbours(torch.nn.Module):
    """Logits of each token alone, plus a little of where it stands and of what stood before it."""

    def __init__(self, of_place: float, of_others: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, 8, generator=generator))
        self.of_place, self.of_others = of_place, of_others
        self.config = SimpleNamespace(model_type="neighbours")

    def forward(self, input_ids, position_ids, use_cache):
        own = self.table[input_ids]
        count = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        others = own.cumsum(dim=1) / count
        return SimpleNamespace(logits=own + self.of_place * count + self.of_others * others)


def test_a_model_that_counts_from_the_start_of_the_row_is_refused():
    """Its documents do not see each other, but know how much stands in front of them."""
    model = Neighbours(of_place=0.01, of_others=0.0)
    assert measure_isolation(model, VOCABULARY, "fp32").swapped == 0.0
    with pytest.raises(ConfigError, match="neighbours"):
        check_isolation(model, VOCABULARY, "fp32")


def test_a_model_that_leaks_less_than_other_kernels_may_differ_is_refused():
    """Alone it would pass; no kernel explains a change of what stands in front."""
    model = Neighbours(of_place=0.0, of_others=0.0015)
    assert measure_isolation(model, VOCABULARY, "fp32").alone < 1e-3
    with pytest.raises(ConfigError, match="neighbours"):
        check_isolation(model, VOCABULARY, "fp32")


def test_a_model_of_single_tokens_is_taken():
    model = Neighbours(of_place=0.0, of_others=0.0)
    assert check_isolation(model, VOCABULARY, "fp32") == (0.0, 0.0)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_model_with_a_broken_weight_is_refused(spoil, bad):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float(bad)

    with pytest.raises(ConfigError, match="qwen2"):
        check_isolation(build(spoil(change)), VOCABULARY, "fp32")


@both_adapters
def test_adapters_that_were_trained_keep_documents_apart(bases, method):
    model = build(bases("mistral"), method)
    train_steps(model, 2)
    measured = check_isolation(model, VOCABULARY, "fp32")
    assert measured.swapped <= 1e-6
    assert measured.alone < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_mode_gradients_and_random_numbers_as_they_were(bases, training):
    model = build(bases()).train(training)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    measure_isolation(model, VOCABULARY, "fp32")
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.rand(3), expected)


def test_dropout_is_off_while_isolation_is_measured(tmp_path):
    """GPT-2 has dropout of its own: 0.1."""
    model = build(write_model_config(tmp_path, "gpt2")).train()
    assert measure_isolation(model, VOCABULARY, "fp32").swapped == 0.0


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens", "norm"])
def test_layers_trained_whole_pass_the_isolation_check_with_a_bf16_base(bases, layer):
    """As in every run with bf16: before accelerate wraps the model in autocast."""
    model = build(
        bases(), "lora", "bf16", modules_to_save=(layer,), lora_target_modules=("q_proj",)
    )
    check_isolation(model, VOCABULARY, "bf16")


def test_a_bert_that_predicts_masked_words_is_refused(tmp_path):
    """It loads, since transformers can make a decoder of it; its documents see each other."""
    file = write_model_config(tmp_path / "config", "bert", initializer_range=0.2)
    config = transformers.AutoConfig.from_pretrained(file)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ConfigError, match="bert"):
        check_isolation(build(tmp_path / "bert"), VOCABULARY, "fp32")
