"""Progress: counters that add up, and what is due when."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qloop.steps import Progress

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
