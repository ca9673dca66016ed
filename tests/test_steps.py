"""Counters, seeds, the blocks of a step, and where a run ends: all pure."""

import dataclasses
import doctest
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import qloop.steps
from qloop.config.keys import BatchConfig
from qloop.errors import ConfigError
from qloop.hardware import use_deterministic_kernels
from qloop.steps import Progress, StepLayout, block_ids_at, divide_step, seed_at, seed_forward_pass

updates = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 10**8)), max_size=30)
any_speed = settings(deadline=None)


def steps_that_are_due(every_steps: int, last_step: int) -> list[int]:
    steps = range(1, last_step + 1)
    return [step for step in steps if Progress(step=step).is_due(every_steps, last_step)]


def test_a_run_begins_with_nothing_done():
    assert Progress() == Progress(step=0, blocks_seen=0, tokens_seen=0)


def test_an_update_counts_one_step_its_blocks_and_its_targets():
    progress = Progress(step=4, blocks_seen=32, tokens_seen=1000)
    progress.advance(blocks=8, target_tokens=250)
    assert progress == Progress(step=5, blocks_seen=40, tokens_seen=1250)


def test_an_update_without_targets_is_a_step_all_the_same():
    progress = Progress()
    progress.advance(blocks=8, target_tokens=0)
    assert progress == Progress(step=1, blocks_seen=8, tokens_seen=0)


@given(updates=updates)
@any_speed
def test_counters_are_the_sums_over_all_updates(updates):
    progress = Progress()
    for blocks, target_tokens in updates:
        progress.advance(blocks, target_tokens)
    assert progress.step == len(updates)
    assert progress.blocks_seen == sum(blocks for blocks, _ in updates)
    assert progress.tokens_seen == sum(target_tokens for _, target_tokens in updates)


@given(updates=updates, cut=st.integers(0, 30))
@any_speed
def test_a_restart_in_the_middle_counts_on(updates, cut):
    whole, first = Progress(), Progress()
    for update in updates:
        whole.advance(*update)
    for update in updates[:cut]:
        first.advance(*update)
    second = Progress(**dataclasses.asdict(first))
    for update in updates[cut:]:
        second.advance(*update)
    assert second == whole


def test_it_is_due_at_multiples_and_at_the_end():
    assert steps_that_are_due(every_steps=3, last_step=10) == [3, 6, 9, 10]


def test_an_end_that_is_a_multiple_is_due_once():
    assert steps_that_are_due(every_steps=5, last_step=10) == [5, 10]


def test_every_step_is_due_with_1():
    assert steps_that_are_due(every_steps=1, last_step=4) == [1, 2, 3, 4]


def test_only_the_end_is_due_with_0():
    assert steps_that_are_due(every_steps=0, last_step=10) == [10]


def test_only_the_end_is_due_when_the_run_is_shorter_than_the_interval():
    assert steps_that_are_due(every_steps=100, last_step=10) == [10]


@pytest.mark.parametrize("every_steps", [0, 3])
def test_asking_what_is_due_changes_nothing(every_steps):
    progress = Progress(step=3, blocks_seen=24, tokens_seen=700)
    progress.is_due(every_steps, last_step=10)
    assert progress == Progress(step=3, blocks_seen=24, tokens_seen=700)


# Other numbers of processes


def divide(batch_size: int, accumulation: int, processes: int, saved: int | None) -> StepLayout:
    batch = BatchConfig(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    return divide_step(batch, processes, saved, Path("checkpoint-3"))


def test_the_first_start_decides_the_blocks_of_a_step():
    assert divide(2, 8, 4, None) == StepLayout(64, 8)


def test_on_more_processes_each_accumulates_less():
    step = divide(1, 8, 4, 16)
    assert (step.blocks, step.accumulation) == (16, 4)


def test_on_the_same_number_of_processes_the_step_is_divided_as_before():
    assert divide(1, 8, 2, 16) == StepLayout(16, 8)


def test_processes_that_do_not_divide_a_step_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"reads 16 blocks.*start 1, 2, 4, 8 or 16 processes"):
        divide(1, 8, 3, 16)
    with pytest.raises(ConfigError, match="start 1, 2 or 4 processes"):
        divide(4, 8, 8, 16)
    with pytest.raises(ConfigError, match="lower batch_size"):
        divide(3, 1, 1, 16)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_the_micro_batches_of_a_step_are_the_same_on_any_number_of_processes(
    batch_size, micro_batches, num_processes, blocks_seen
):
    """Micro-batch m is the same blocks under the same seed, whichever rank has it."""
    if micro_batches % num_processes:
        return
    step = divide(batch_size, 1, num_processes, batch_size * micro_batches)
    block_ids = block_ids_at(blocks_seen, step.blocks, 37, seed=5)
    dealt = block_ids.reshape(step.accumulation, num_processes, batch_size)
    by_number = {
        number * num_processes + rank: dealt[number, rank].tolist()
        for number in range(step.accumulation)
        for rank in range(num_processes)
    }
    alone = block_ids.reshape(micro_batches, batch_size)
    assert by_number == {number: ids.tolist() for number, ids in enumerate(alone)}


run_seeds = st.integers(0, 2**32 - 1)
steps = st.integers(0, 10**7)
micro_batches = st.integers(0, 10**5)
any_speed = settings(deadline=None)


def draw_dropout_mask(seed: int, step: int, micro_batch: int) -> list[bool]:
    torch.manual_seed(seed_at(seed, step, micro_batch))
    return (F.dropout(torch.ones(256), p=0.5) == 0).tolist()


@given(seed=run_seeds, step=steps, micro_batch=micro_batches)
def test_the_same_place_has_the_same_seed(seed, step, micro_batch):
    assert seed_at(seed, step, micro_batch) == seed_at(seed, step, micro_batch)


@given(seed=run_seeds, step=steps, micro_batch=micro_batches)
@any_speed
def test_seeds_fit_into_63_bits_and_torch_takes_them(seed, step, micro_batch):
    drawn = seed_at(seed, step, micro_batch)
    assert 0 <= drawn < 2**63
    assert torch.Generator().manual_seed(drawn).initial_seed() == drawn


def test_a_seed_depends_on_nothing_that_was_drawn_before():
    torch.manual_seed(1)
    first = seed_at(42, 7, 3)
    torch.manual_seed(2)
    torch.rand(5)
    assert seed_at(42, 7, 3) == first


def test_asking_for_a_seed_leaves_torchs_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    seed_at(42, 7, 3)
    assert torch.equal(torch.rand(4), expected)


def test_no_two_steps_and_micro_batches_of_a_run_share_a_seed():
    drawn = {seed_at(42, step, micro_batch) for step in range(500) for micro_batch in range(40)}
    assert len(drawn) == 500 * 40


def test_runs_of_other_seeds_share_no_seed():
    drawn = {seed_at(seed, step, 0) for seed in range(100) for step in range(100)}
    assert len(drawn) == 100 * 100


def test_digits_do_not_run_from_one_number_into_the_next():
    assert len({seed_at(1, 23, 4), seed_at(12, 3, 4), seed_at(1, 2, 34)}) == 3


def test_step_and_micro_batch_are_not_interchangeable():
    assert seed_at(42, 1, 2) != seed_at(42, 2, 1)


def test_dropout_of_a_step_can_be_drawn_again_out_of_order():
    masks = {step: draw_dropout_mask(42, step, 0) for step in (0, 1, 2, 3)}
    assert {step: draw_dropout_mask(42, step, 0) for step in (3, 1, 0, 2)} == masks


def test_dropout_differs_between_steps_micro_batches_and_runs():
    places = [(seed, step, number) for seed in (1, 2) for step in (0, 1) for number in (0, 1)]
    assert len({tuple(draw_dropout_mask(*place)) for place in places}) == 8


@pytest.fixture
def no_workspace_setting(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_deterministic_kernels_are_asked_for_on_cpu_and_gpu(no_workspace_setting):
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_setting_of_the_users_own_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_forward_pass_draws_the_same_from_every_generator():
    drawn = []
    for noise in (1, 2):
        random.seed(noise)
        np.random.seed(noise)
        torch.manual_seed(noise)
        seed_forward_pass(seed_at(2**32 - 1, 10**6, 63))
        drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert drawn[0] == drawn[1]
    seed_forward_pass(seed_at(2**32 - 1, 10**6, 64))
    other = (float(torch.rand(())), random.random(), float(np.random.rand()))
    assert all(one != two for one, two in zip(drawn[0], other, strict=True))


# Which blocks a step reads


@given(
    num_blocks=st.integers(1, 40),
    step_blocks=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    num_epochs=st.integers(1, 4),
)
@any_speed
def test_every_epoch_is_a_permutation_of_all_blocks(num_blocks, step_blocks, seed, num_epochs):
    num_steps = -(-num_blocks * num_epochs // step_blocks)
    starts = range(0, num_steps * step_blocks, step_blocks)
    ids = [block_ids_at(start, step_blocks, num_blocks, seed) for start in starts]
    places = np.concatenate(ids)[: num_blocks * num_epochs].reshape(num_epochs, num_blocks)
    assert (np.sort(places, axis=1) == np.arange(num_blocks)).all()


@given(
    steps=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    num_blocks=st.integers(1, 40),
    step_blocks=st.integers(1, 60),
)
@any_speed
def test_a_steps_blocks_do_not_depend_on_what_was_asked_before(steps, num_blocks, step_blocks):
    def ids_at(step: int) -> list[int]:
        return block_ids_at(step * step_blocks, step_blocks, num_blocks, seed=7).tolist()

    rising = {step: ids_at(step) for step in sorted(steps)}
    assert [ids_at(step) for step in steps] == [rising[step] for step in steps]


def test_the_answer_may_be_changed_without_changing_the_next():
    first = block_ids_at(0, 4, 8, seed=1)
    expected = first.tolist()
    first[:] = -1
    assert block_ids_at(0, 4, 8, seed=1).tolist() == expected


def test_the_order_differs_between_epochs_and_seeds():
    orders = {
        tuple(block_ids_at(50 * epoch, 50, 50, seed).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@given(num_blocks=st.integers(1, 40), one=st.integers(1, 12), two=st.integers(1, 12))
@any_speed
def test_the_order_of_blocks_does_not_depend_on_how_many_a_step_takes(num_blocks, one, two):
    by_one = np.concatenate([block_ids_at(step * one, one, num_blocks, 3) for step in range(two)])
    by_two = np.concatenate([block_ids_at(step * two, two, num_blocks, 3) for step in range(one)])
    assert by_one.tolist() == by_two.tolist()


def test_the_examples_in_the_module_are_true():
    results = doctest.testmod(qloop.steps)
    assert results.attempted >= 2
    assert results.failed == 0
