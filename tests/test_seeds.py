"""Seeds: a pure function of (seed, step, micro-batch), different wherever one of them is."""

import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qloop.seeds import seed_at, seed_forward_pass, use_deterministic_kernels

run_seeds = st.integers(0, 2**32 - 1)
steps = st.integers(0, 10**7)
micro_batches = st.integers(0, 10**5)
any_speed = settings(deadline=None)


def draw_dropout_mask(seed: int, step: int, micro_batch: int) -> list[bool]:
    torch.manual_seed(seed_at(seed, step, micro_batch))
    return (F.dropout(torch.ones(256), p=0.5) == 0).tolist()


@given(seed=run_seeds, step=steps, micro_batch=micro_batches)
@any_speed
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
