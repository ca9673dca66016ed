"""Held-out measures: what they are, and what they do not depend on."""

import math

import pytest
import torch

from qloop.data.batches import build_micro_batch
from qloop.evaluation.completions import sample_completions
from qloop.evaluation.held_out import evaluate
from qloop.model.loss import compute_logits
from qloop.run import assemble


@pytest.fixture
def parts(make_config):
    parts = assemble(make_config(), [])
    yield parts
    parts.close()


def measure(parts, batch_size: int):
    held_out = parts.held_out
    return evaluate(
        parts.model, parts.loss, held_out.store, held_out.index, batch_size, parts.accelerator
    )


def test_results_do_not_depend_on_the_batch_size(parts):
    one, others = measure(parts, 1), [measure(parts, size) for size in (3, 7, 100)]
    for other in others:
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert other.bits_per_byte == pytest.approx(one.bits_per_byte, abs=1e-6)
        assert other.token_accuracy == one.token_accuracy
        assert other.target_tokens == one.target_tokens


def test_every_target_weighs_the_same(parts):
    """Against torch's own mean over all targets of all blocks, taken in one go."""
    held_out = parts.held_out
    blocks = torch.arange(len(held_out.index)).numpy()
    batch = build_micro_batch(held_out.store, held_out.index, blocks)
    with torch.no_grad():
        logits = compute_logits(parts.model, batch)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert measure(parts, 2).loss == pytest.approx(float(mean), abs=1e-5)


def test_the_measures_are_those_of_the_loss(parts):
    result = measure(parts, 4)
    assert result.target_tokens == parts.held_out.store.target_tokens
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    nats = result.loss * result.target_tokens
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.target_bytes)
    assert 0 <= result.token_accuracy <= 1


def test_an_untrained_model_knows_as_much_as_its_vocabulary_size(parts):
    assert measure(parts, 4).loss == pytest.approx(math.log(1024), abs=0.2)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(parts, training):
    parts.model.train(training)
    measure(parts, 4)
    assert parts.model.training == training
    sample_completions(
        parts.model, parts.tokenizer, parts.held_out.store, 1, 4, 0, parts.accelerator
    )
    assert parts.model.training == training


def test_samples_stand_beside_the_true_text(parts):
    samples = sample_completions(
        parts.model, parts.tokenizer, parts.held_out.store, 2, 8, 0, parts.accelerator
    )
    assert len(samples) == 2
    for sample in samples:
        assert sample.prefix.startswith("/ module")
        assert sample.truth


def test_the_same_seed_draws_the_same_samples(parts):
    drawn = [
        sample_completions(
            parts.model, parts.tokenizer, parts.held_out.store, 2, 8, seed, parts.accelerator
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
