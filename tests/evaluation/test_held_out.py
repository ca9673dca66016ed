"""Held-out measures: what they are, and what they do not depend on."""

import math

import pytest
import torch

from qloop.data.batches import build_micro_batch
from qloop.evaluation.completions import sample_completions
from qloop.evaluation.held_out import evaluate
from qloop.model.loss import compute_logits
from qloop.run import build_run


@pytest.fixture
def run(make_config):
    run = build_run(make_config())
    yield run
    run.close()


def measure(run, batch_size: int):
    held_out = run.data.held_out
    return evaluate(
        run.model, run.target_loss, held_out.store, held_out.index, batch_size, run.accelerator
    )


def test_results_do_not_depend_on_the_batch_size(run):
    one, others = measure(run, 1), [measure(run, size) for size in (3, 7, 100)]
    for other in others:
        assert other.loss == pytest.approx(one.loss, abs=1e-6)
        assert other.bits_per_byte == pytest.approx(one.bits_per_byte, abs=1e-6)
        assert other.token_accuracy == one.token_accuracy
        assert other.target_tokens == one.target_tokens


def test_every_target_weighs_the_same(run):
    """Against torch's own mean over all targets of all blocks, taken in one go."""
    held_out = run.data.held_out
    blocks = torch.arange(len(held_out.index)).numpy()
    batch = build_micro_batch(held_out.store, held_out.index, blocks)
    with torch.no_grad():
        logits = compute_logits(run.model, batch)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert measure(run, 2).loss == pytest.approx(float(mean), abs=1e-5)


def test_the_measures_are_those_of_the_loss(run):
    result = measure(run, 4)
    assert result.target_tokens == run.data.held_out.store.target_tokens
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    nats = result.loss * result.target_tokens
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.target_bytes)
    assert 0 <= result.token_accuracy <= 1


def test_an_untrained_model_knows_as_much_as_its_vocabulary_size(run):
    assert measure(run, 4).loss == pytest.approx(math.log(1024), abs=0.2)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(run, training):
    run.model.train(training)
    measure(run, 4)
    assert run.model.training == training
    sample_completions(
        run.model, run.data.tokenizer, run.data.held_out.store, 1, 4, 0, run.accelerator
    )
    assert run.model.training == training


def test_samples_stand_beside_the_true_text(run):
    samples = sample_completions(
        run.model, run.data.tokenizer, run.data.held_out.store, 2, 8, 0, run.accelerator
    )
    assert len(samples) == 2
    for sample in samples:
        assert sample.prefix.startswith("/ module")
        assert sample.truth


def test_the_same_seed_draws_the_same_samples(run):
    drawn = [
        sample_completions(
            run.model, run.data.tokenizer, run.data.held_out.store, 2, 8, seed, run.accelerator
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
