"""The loss: a sum over targets that depends on nothing but them."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from qloop.data.batches import IGNORED, MicroBatch
from qloop.model.loss import compute_logits, next_token_loss, predict


class Bigrams(torch.nn.Module):
    """The smallest language model: a row of logits for each token, whatever came before it."""

    def __init__(self, table: list[list[float]] | torch.Tensor, dtype=torch.float32) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.as_tensor(table).to(dtype))

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


# next_token_loss


def test_the_loss_of_a_case_by_hand():
    """Shares 2/4, 3/8 and 6/8 of the targets: nats ln 2 + ln(8/3) + ln(4/3) = ln(64/9)."""
    micro_batch = micro_batch_of([[0, 1, 2]], [[2, 1, 0]])
    loss = next_token_loss(build_bigrams(), micro_batch)
    assert loss.item() == pytest.approx(math.log(64 / 9), rel=1e-6)


def test_the_loss_is_torchs_cross_entropy_summed():
    model, micro_batch = draw_bigrams(), draw_micro_batch()
    logits = model.table[micro_batch.input_ids].flatten(0, 1)
    expected = F.cross_entropy(logits, micro_batch.labels.flatten(), reduction="sum")
    assert next_token_loss(model, micro_batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_a_sum_and_not_a_mean():
    once = micro_batch_of([[0, 1, 2]], [[2, 1, 0]])
    twice = micro_batch_of([[0, 1, 2]] * 2, [[2, 1, 0]] * 2)
    loss = next_token_loss(build_bigrams(), once).item()
    assert next_token_loss(build_bigrams(), twice).item() == pytest.approx(2 * loss, rel=1e-6)


def test_labels_are_not_shifted_again():
    """After 1 the odds of 2 are 4/8; a second shift would ask for 2 after 0, or for nothing."""
    micro_batch = micro_batch_of([[0, 1]], [[IGNORED, 2]])
    loss = next_token_loss(build_bigrams(), micro_batch)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_what_stands_where_there_is_no_label_does_not_matter():
    one = micro_batch_of([[0, 1, 2, 0]], [[2, IGNORED, 0, IGNORED]])
    other = micro_batch_of([[0, 0, 2, 1]], [[2, IGNORED, 0, IGNORED]])
    model = build_bigrams()
    assert torch.equal(next_token_loss(model, one), next_token_loss(model, other))


def test_no_gradient_comes_from_where_there_is_no_label():
    """Token 1 is read, but nothing is to be predicted from it."""
    model = build_bigrams()
    next_token_loss(model, micro_batch_of([[0, 1, 2]], [[2, IGNORED, 0]])).backward()
    assert (model.table.grad != 0).any(dim=1).tolist() == [True, False, True]


def test_a_micro_batch_without_targets_has_loss_zero_and_gradients_zero():
    model = build_bigrams()
    loss = next_token_loss(model, micro_batch_of([[0, 1, 2]], [[IGNORED] * 3]))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(model.table.grad, torch.zeros(3, 3))


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_the_loss_does_not_depend_on_how_a_batch_is_split(rows):
    model, micro_batch = draw_bigrams(), draw_micro_batch(rows=6)
    parts = [rows_of(micro_batch, slice(first, first + rows)) for first in range(0, 6, rows)]
    total = sum(next_token_loss(model, part).item() for part in parts)
    assert total == pytest.approx(next_token_loss(model, micro_batch).item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_gradient_does_not_depend_on_how_a_batch_is_split(rows):
    whole, split, micro_batch = draw_bigrams(), draw_bigrams(), draw_micro_batch(rows=6)
    next_token_loss(whole, micro_batch).backward()
    for first in range(0, 6, rows):
        next_token_loss(split, rows_of(micro_batch, slice(first, first + rows))).backward()
    torch.testing.assert_close(split.table.grad, whole.table.grad, rtol=1e-5, atol=1e-6)


def test_a_certain_model_has_no_loss_and_a_certainly_wrong_one_a_finite_loss():
    model = Bigrams([[0.0, 1e4], [0.0, 1e4]])
    assert next_token_loss(model, micro_batch_of([[0, 1]], [[1, 1]])).item() == 0.0
    assert next_token_loss(model, micro_batch_of([[0, 1]], [[0, 0]])).item() == 2e4


def test_a_bf16_models_loss_is_computed_in_float32():
    model = Bigrams(torch.tensor(ODDS).log(), dtype=torch.bfloat16)
    micro_batch = micro_batch_of([[0, 1, 2]], [[2, 1, 0]])
    assert compute_logits(model, micro_batch).dtype == torch.float32
    expected = F.cross_entropy(model.table.float(), torch.tensor([2, 1, 0]), reduction="sum")
    assert next_token_loss(model, micro_batch).item() == pytest.approx(expected.item(), rel=1e-6)


# predict


def test_predict_sums_the_same_loss():
    model, micro_batch = draw_bigrams(), draw_micro_batch()
    expected = next_token_loss(model, micro_batch).item()
    assert predict(model, micro_batch).loss_sum.item() == pytest.approx(expected, rel=1e-6)


def test_predict_sums_in_float64():
    assert predict(draw_bigrams(), draw_micro_batch()).loss_sum.dtype == torch.float64


def test_right_answers_by_hand():
    """The likeliest after 0 and 1 is 2, after 2 it is 0: right, wrong, right, no target."""
    micro_batch = micro_batch_of([[0, 1, 2, 0]], [[2, 1, 0, IGNORED]])
    assert int(predict(build_bigrams(), micro_batch).correct) == 2


def test_positions_without_a_label_are_never_right():
    micro_batch = micro_batch_of([[0, 1, 2]], [[IGNORED] * 3])
    prediction = predict(build_bigrams(), micro_batch)
    assert int(prediction.correct) == 0
    assert prediction.loss_sum.item() == 0.0


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_predictions_do_not_depend_on_how_a_batch_is_split(rows):
    model, micro_batch = draw_bigrams(), draw_micro_batch(rows=6)
    whole = predict(model, micro_batch)
    parts = [
        predict(model, rows_of(micro_batch, slice(first, first + rows)))
        for first in range(0, 6, rows)
    ]
    assert sum(int(part.correct) for part in parts) == int(whole.correct)
    total = sum(part.loss_sum.item() for part in parts)
    assert total == pytest.approx(whole.loss_sum.item(), rel=1e-12)
