"""The loss: a sum over targets that depends on nothing but them."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from references import next_token_loss, predict
from transformers import PreTrainedConfig
from workspace import write_model_config

import qloop.model.linear_loss
import qloop.model.loss
from qloop.config.keys import LoraConfig, ModelConfig
from qloop.data.batches import IGNORED, MicroBatch
from qloop.errors import ConfigError
from qloop.model.build import build_model
from qloop.model.compilation import count_compilations
from qloop.model.linear_loss import divide_evenly, fused_grad_logits, softmax_grad_logits
from qloop.model.loss import Prediction, TargetLoss, build_target_loss, choose, compute_logits

CPU = torch.device("cpu")


class Bigrams(torch.nn.Module):
    """The smallest language model: a row of logits for each token, whatever came before it."""

    def __init__(self, table: list[list[float]] | torch.Tensor, dtype=torch.float32) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(table).to(dtype))
        self.config = PreTrainedConfig(vocab_size=len(self.table))

    def forward(self, input_ids, position_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


# After token 0 the odds of tokens 0, 1, 2 are 1:1:2, after 1 they are 1:3:4, after 2 6:1:1.
ODDS = [[1.0, 1.0, 2.0], [1.0, 3.0, 4.0], [6.0, 1.0, 1.0]]


def build_bigrams() -> Bigrams:
    return Bigrams(torch.tensor(ODDS).log())


def micro_batch_of(input_ids: list[list[int]], labels: list[list[int]]) -> MicroBatch:
    ids = torch.tensor(input_ids)
    return MicroBatch(ids, torch.tensor(labels), torch.arange(ids.shape[1]).expand_as(ids))


def draw_micro_batch(rows: int = 6, length: int = 40, vocabulary_size: int = 50) -> MicroBatch:
    """Random tokens, of which about a third have no label."""
    generator = torch.Generator().manual_seed(3)
    shape = (rows, length)
    labels = torch.randint(vocabulary_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = IGNORED
    ids = torch.randint(vocabulary_size, shape, generator=generator)
    return MicroBatch(ids, labels, torch.arange(length).expand(shape))


def draw_bigrams(vocabulary_size: int = 50) -> Bigrams:
    generator = torch.Generator().manual_seed(4)
    return Bigrams(torch.randn(vocabulary_size, vocabulary_size, generator=generator))


def rows_of(micro_batch: MicroBatch, rows: slice) -> MicroBatch:
    return MicroBatch(
        micro_batch.input_ids[rows], micro_batch.labels[rows], micro_batch.position_ids[rows]
    )


def sum_loss(model: Bigrams, micro_batch: MicroBatch) -> torch.Tensor:
    return TargetLoss(model, "logits", "cpu").sum(model, micro_batch)


def predict_all(model: Bigrams, micro_batch: MicroBatch) -> Prediction:
    return TargetLoss(model, "logits", "cpu").predict(model, micro_batch)


# All logits at once


def test_the_loss_of_a_case_by_hand():
    """Shares 2/4, 3/8 and 6/8 of the targets: nats ln 2 + ln(8/3) + ln(4/3) = ln(64/9)."""
    micro_batch = micro_batch_of([[0, 1, 2]], [[2, 1, 0]])
    loss = sum_loss(build_bigrams(), micro_batch)
    assert loss.item() == pytest.approx(math.log(64 / 9), rel=1e-6)


def test_the_loss_is_torchs_cross_entropy_summed():
    model, micro_batch = draw_bigrams(), draw_micro_batch()
    logits = model.table[micro_batch.input_ids].flatten(0, 1)
    expected = F.cross_entropy(logits, micro_batch.labels.flatten(), reduction="sum")
    assert sum_loss(model, micro_batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_a_sum_and_not_a_mean():
    once = micro_batch_of([[0, 1, 2]], [[2, 1, 0]])
    twice = micro_batch_of([[0, 1, 2]] * 2, [[2, 1, 0]] * 2)
    loss = sum_loss(build_bigrams(), once).item()
    assert sum_loss(build_bigrams(), twice).item() == pytest.approx(2 * loss, rel=1e-6)


def test_labels_are_not_shifted_again():
    """After 1 the odds of 2 are 4/8; a second shift would ask for 2 after 0, or for nothing."""
    micro_batch = micro_batch_of([[0, 1]], [[IGNORED, 2]])
    loss = sum_loss(build_bigrams(), micro_batch)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_what_stands_where_there_is_no_label_does_not_matter():
    one = micro_batch_of([[0, 1, 2, 0]], [[2, IGNORED, 0, IGNORED]])
    other = micro_batch_of([[0, 0, 2, 1]], [[2, IGNORED, 0, IGNORED]])
    model = build_bigrams()
    assert torch.equal(sum_loss(model, one), sum_loss(model, other))


def test_no_gradient_comes_from_where_there_is_no_label():
    """Token 1 is read, but nothing is to be predicted from it."""
    model = build_bigrams()
    sum_loss(model, micro_batch_of([[0, 1, 2]], [[2, IGNORED, 0]])).backward()
    assert (model.table.grad != 0).any(dim=1).tolist() == [True, False, True]


def test_a_micro_batch_without_targets_has_loss_zero_and_gradients_zero():
    model = build_bigrams()
    loss = sum_loss(model, micro_batch_of([[0, 1, 2]], [[IGNORED] * 3]))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(model.table.grad, torch.zeros(3, 3))


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_the_loss_does_not_depend_on_how_a_batch_is_split(rows):
    model, micro_batch = draw_bigrams(), draw_micro_batch(rows=6)
    parts = [rows_of(micro_batch, slice(first, first + rows)) for first in range(0, 6, rows)]
    total = sum(sum_loss(model, part).item() for part in parts)
    assert total == pytest.approx(sum_loss(model, micro_batch).item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_gradient_does_not_depend_on_how_a_batch_is_split(rows):
    whole, split, micro_batch = draw_bigrams(), draw_bigrams(), draw_micro_batch(rows=6)
    sum_loss(whole, micro_batch).backward()
    for first in range(0, 6, rows):
        sum_loss(split, rows_of(micro_batch, slice(first, first + rows))).backward()
    torch.testing.assert_close(split.table.grad, whole.table.grad, rtol=1e-5, atol=1e-6)


def test_a_certain_model_has_no_loss_and_a_certainly_wrong_one_a_finite_loss():
    model = Bigrams([[0.0, 1e4], [0.0, 1e4]])
    assert sum_loss(model, micro_batch_of([[0, 1]], [[1, 1]])).item() == 0.0
    assert sum_loss(model, micro_batch_of([[0, 1]], [[0, 0]])).item() == 2e4


def test_a_bf16_models_loss_is_computed_in_float32():
    model = Bigrams(torch.tensor(ODDS).log(), dtype=torch.bfloat16)
    micro_batch = micro_batch_of([[0, 1, 2]], [[2, 1, 0]])
    assert compute_logits(model, micro_batch).dtype == torch.float32
    expected = F.cross_entropy(model.table.float(), torch.tensor([2, 1, 0]), reduction="sum")
    assert sum_loss(model, micro_batch).item() == pytest.approx(expected.item(), rel=1e-6)


# Predictions from all logits


def test_predict_sums_the_same_loss():
    model, micro_batch = draw_bigrams(), draw_micro_batch()
    expected = sum_loss(model, micro_batch).item()
    assert predict_all(model, micro_batch).loss_sum.item() == pytest.approx(expected, rel=1e-6)


def test_predict_sums_in_float64():
    assert predict_all(draw_bigrams(), draw_micro_batch()).loss_sum.dtype == torch.float64


def test_right_answers_by_hand():
    """The likeliest after 0 and 1 is 2, after 2 it is 0: right, wrong, right, no target."""
    micro_batch = micro_batch_of([[0, 1, 2, 0]], [[2, 1, 0, IGNORED]])
    assert int(predict_all(build_bigrams(), micro_batch).correct) == 2


def test_positions_without_a_label_are_never_right():
    micro_batch = micro_batch_of([[0, 1, 2]], [[IGNORED] * 3])
    prediction = predict_all(build_bigrams(), micro_batch)
    assert int(prediction.correct) == 0
    assert prediction.loss_sum.item() == 0.0


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_predictions_do_not_depend_on_how_a_batch_is_split(rows):
    model, micro_batch = draw_bigrams(), draw_micro_batch(rows=6)
    whole = predict_all(model, micro_batch)
    parts = [
        predict_all(model, rows_of(micro_batch, slice(first, first + rows)))
        for first in range(0, 6, rows)
    ]
    assert sum(int(part.correct) for part in parts) == int(whole.correct)
    total = sum(part.loss_sum.item() for part in parts)
    assert total == pytest.approx(whole.loss_sum.item(), rel=1e-12)


# The same without all logits

HEADS: dict[str, dict] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {},
    "with a bias": {"model_type": "phi"},
    "frozen": {"training_method": "lora"},
    "LoRA": {"training_method": "lora", "lora_target_modules": ("lm_head", "q_proj")},
    "DoRA": {"training_method": "lora", "lora_target_modules": ("lm_head",), "use_dora": True},
    "trained with adapters": {"training_method": "lora", "modules_to_save": ("lm_head",)},
    "4 bits below": {"training_method": "qlora"},
}
kinds = pytest.mark.parametrize("kind", ["chunked", "fused"])
heads = pytest.mark.parametrize("head", HEADS)


def build(folder, training_method="full", model_type="qwen2", **keys):
    """A model of 1024 tokens' vocabulary; adapters stand on a base of that kind."""
    lora_keys = {key: keys.pop(key) for key in LoraConfig.model_fields.keys() & keys.keys()}
    file = write_model_config(folder / "config", model_type, initializer_range=0.2, **keys)
    options = {"model_config_file": file, "gradient_checkpointing": False}
    model = build_model(ModelConfig(**options), LoraConfig(), "fp32", CPU, seed=0)
    if training_method == "full":
        return model
    model.save_pretrained(folder / "base")
    config = ModelConfig(
        model_name=str(folder / "base"),
        training_method=training_method,
        gradient_checkpointing=False,
    )
    adapters = LoraConfig(lora_dropout=0.0, **lora_keys)
    return build_model(config, adapters, "fp32", CPU, seed=0)


def gradients_of(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss * 0.25).backward()  # as the loop scales it
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@heads
@kinds
def test_every_kind_is_the_plain_loss_with_the_plain_gradients(tmp_path, head, kind, monkeypatch):
    monkeypatch.setitem(qloop.model.loss.CHUNK_ELEMENTS, "cpu", 64 * 1024)  # 4 chunks
    model = build(tmp_path, **HEADS[head])
    micro_batch = draw_micro_batch(vocabulary_size=1000)
    expected = next_token_loss(model, micro_batch)
    gradients = gradients_of(model, expected)
    loss = TargetLoss(model, kind).sum(model, micro_batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    mine = gradients_of(model, loss)
    assert mine.keys() == gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


@heads
@kinds
def test_every_kind_predicts_the_same(tmp_path, head, kind, monkeypatch):
    monkeypatch.setitem(qloop.model.loss.CHUNK_ELEMENTS, "cpu", 64 * 1024)
    model = build(tmp_path, **HEADS[head])
    micro_batch = draw_micro_batch(vocabulary_size=1000)
    with torch.no_grad():
        expected = predict(model, micro_batch)
        got = TargetLoss(model, kind).predict(model, micro_batch)
    assert got.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert int(got.correct) == int(expected.correct)


@kinds
def test_a_micro_batch_without_targets_has_no_loss_and_no_gradient(tmp_path, kind):
    model = build(tmp_path)
    micro_batch = micro_batch_of([[0, 1, 2]], [[IGNORED] * 3])
    loss = TargetLoss(model, kind).sum(model, micro_batch)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients_of(model, loss).values())


def test_bf16_multiplies_in_bf16_and_sums_in_float32(tmp_path):
    model = build(tmp_path)
    micro_batch = draw_micro_batch(rows=1, vocabulary_size=1000)
    exact = TargetLoss(model, "chunked").sum(model, micro_batch)
    wanted = gradients_of(model, exact)["lm_head.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = TargetLoss(model, "chunked").sum(model, micro_batch)
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    got = gradients_of(model, loss)["lm_head.weight"]
    assert got.dtype == torch.float32
    assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_the_head_is_itself_again_even_after_an_error(tmp_path):
    model = build(tmp_path)
    micro_batch = draw_micro_batch(rows=1, vocabulary_size=1000)
    before = compute_logits(model, micro_batch)
    loss = TargetLoss(model, "chunked")
    loss.sum(model, micro_batch)
    with pytest.raises(RuntimeError):
        loss.sum(model, MicroBatch(micro_batch.input_ids, before, micro_batch.position_ids))
    assert torch.equal(compute_logits(model, micro_batch), before)


def choose_for(model, wanted: str) -> TargetLoss:
    kind = choose(wanted, device_type="cpu", logits_bytes=2**30, may_compile=True)
    return build_target_loss(model, kind, is_wanted=wanted != "auto", device=CPU, precision="fp32")


@pytest.mark.parametrize(
    ("wanted", "kind"), [("auto", "chunked"), ("logits", "logits"), ("fused", "fused")]
)
def test_a_cpu_never_holds_all_logits_and_a_name_is_obeyed(tmp_path, wanted, kind):
    assert choose_for(build(tmp_path), wanted).kind == kind


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_a_model_that_changes_its_logits_shows_them(tmp_path, model_type, keys):
    model = build(tmp_path, model_type=model_type, **keys)
    chosen = choose_for(model, "auto")
    assert chosen.kind == "logits"
    assert chosen.reason.startswith("chunked does not fit this model: its loss is")
    with pytest.raises(ConfigError, match="loss: chunked does not fit this model: its loss is"):
        choose_for(model, "chunked")


def test_a_kernel_that_fails_is_told_and_the_next_one_taken(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("Cannot find a working triton installation")

    model = build(tmp_path)
    monkeypatch.setattr(qloop.model.linear_loss, "_compiled_kernel", lambda: fail)
    with pytest.raises(ConfigError, match=r"fused does not fit.*RuntimeError: Cannot find"):
        choose_for(model, "fused")
    kind = choose("auto", device_type="cuda", logits_bytes=2**30, may_compile=True)
    assert kind == "fused"
    chosen = build_target_loss(model, kind, is_wanted=False, device=CPU, precision="fp32")
    assert chosen.kind == "chunked"
    assert "fused does not fit this model: RuntimeError: Cannot find a working" in chosen.reason
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("device_type", "logits_bytes", "may_compile", "kind"),
    [
        ("cuda", 8192 * 152_064 * 4, True, "fused"),
        ("cuda", 8192 * 152_064 * 4, False, "chunked"),
        ("cuda", 2**20, True, "logits"),
        ("cpu", 8192 * 152_064 * 4, True, "chunked"),
    ],
)
def test_a_gpu_fuses_what_is_large_unless_nothing_may_be_compiled(
    device_type, logits_bytes, may_compile, kind
):
    keys = {"device_type": device_type, "logits_bytes": logits_bytes, "may_compile": may_compile}
    assert choose("auto", **keys) == kind
    assert choose("chunked", **keys) == "chunked"


def test_the_loss_of_a_target_that_is_all_but_impossible_is_exact():
    """Its share of 1e-400 is none in any type; its loss is e^0 against e^-921."""
    logits = torch.tensor([[0.0, -921.0, -1.0]])
    ids, is_ignored = torch.tensor([[1]]), torch.tensor([[False]])
    expected = 921.0 + math.log1p(math.exp(-1.0))
    for differentiate in (softmax_grad_logits, fused_grad_logits):
        grad_logits, loss_sum = differentiate(logits.clone(), ids, is_ignored)
        assert loss_sum.item() == pytest.approx(expected, rel=1e-6)
        assert grad_logits.sum().item() == pytest.approx(0.0, abs=1e-6)


def test_a_last_chunk_of_another_size_compiles_nothing_anew(tmp_path):
    torch._dynamo.reset()
    model = build(tmp_path)
    loss = TargetLoss(model, "fused")
    loss.compile(torch.float32)
    before = count_compilations()
    for rows in (6, 5, 7):
        loss.sum(model, draw_micro_batch(rows, vocabulary_size=1000)).backward()
    assert count_compilations() == before


def test_no_chunk_is_much_smaller_than_the_others():
    """Of one row, which a kernel for many would be compiled anew for."""
    sizes = {total: divide_evenly(total, 5461) for total in (16_384, 5461, 5462, 1)}
    assert sizes == {16_384: 4096, 5461: 5461, 5462: 2731, 1: 1}


def test_only_a_plain_head_is_fused(tmp_path):
    model = build(tmp_path, **HEADS["LoRA"])
    with pytest.raises(ConfigError, match=r"fused does not fit.*no plain linear layer"):
        choose_for(model, "fused")


@pytest.mark.parametrize("kind", ["chunked", "fused"])
def test_a_bias_has_its_gradient_summed_in_float32_in_bf16_too(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(qloop.model.loss.CHUNK_ELEMENTS, "cpu", 64 * 1024)  # 4 chunks
    model = build(tmp_path, **HEADS["with a bias"])
    micro_batch = draw_micro_batch(vocabulary_size=1000)
    wanted = gradients_of(model, next_token_loss(model, micro_batch))["lm_head.bias"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = TargetLoss(model, kind).sum(model, micro_batch)
    got = gradients_of(model, loss)["lm_head.bias"]
    assert got.dtype == torch.float32
    assert (got - wanted).norm() < 0.02 * wanted.norm()


LARGE = """
import resource, torch
from qloop.model.linear_loss import LinearTargetLoss, softmax_grad_logits
from qloop.model.loss import count_rows
torch.manual_seed(0)
hidden = torch.randn(8192, 16, requires_grad=True)
weight = torch.randn(152_064, 16, requires_grad=True)
labels = torch.randint(152_064, (8192,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = count_rows(152_064, "cuda")
how = (rows, torch.float32, softmax_grad_logits)
loss = LinearTargetLoss.apply(hidden, weight, None, labels, *how)
loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_vocabulary_of_152_thousand_at_8_thousand_tokens_takes_less_than_a_gigabyte():
    """All logits would be 5 GB; in chunks as large as a GPU gets them."""
    ran = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert 0 < int(ran.stdout) < 1e9
