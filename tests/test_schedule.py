"""The learning rate: its values where they are known, and its shape everywhere."""

import doctest
import itertools
import math
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qloop.schedule
from qloop.schedule import learning_rate_at


class Shape(NamedTuple):
    """A schedule, in the order of `learning_rate_at`'s arguments after the step."""

    peak: float
    floor: float
    warmup_steps: int
    max_steps: int


any_speed = settings(deadline=None)


@st.composite
def shapes(draw) -> Shape:
    peak = draw(st.floats(1e-7, 1.0))
    floor = draw(st.floats(0.0, 1.0)) * peak
    warmup_steps = draw(st.integers(0, 500))
    return Shape(peak, floor, warmup_steps, warmup_steps + draw(st.integers(1, 2000)))


def test_the_first_update_has_a_rate_above_zero():
    assert learning_rate_at(0, 1.0, 0.1, warmup_steps=3, max_steps=7) == 0.25


def test_the_warm_up_rises_in_equal_steps():
    rates = [learning_rate_at(step, 1.0, 0.1, warmup_steps=3, max_steps=7) for step in range(4)]
    assert rates == [0.25, 0.5, 0.75, 1.0]


def test_the_peak_is_reached_when_the_warm_up_is_over():
    assert learning_rate_at(100, 2e-5, 0.0, warmup_steps=100, max_steps=1000) == 2e-5


def test_without_warm_up_the_first_update_has_the_peak():
    assert learning_rate_at(0, 0.5, 0.0, warmup_steps=0, max_steps=10) == 0.5


def test_half_way_down_the_rate_is_the_mean_of_peak_and_floor():
    assert learning_rate_at(5, 1.0, 0.5, warmup_steps=3, max_steps=7) == 0.75


def test_a_third_of_the_way_down_it_has_lost_a_quarter():
    """cos(60 degrees) = 1 / 2, so that 3 / 4 of the way from floor to peak is left."""
    rate = learning_rate_at(4, 1.0, 0.2, warmup_steps=2, max_steps=8)
    assert rate == pytest.approx(0.8, rel=1e-15)


def test_the_floor_is_met_exactly_at_the_end():
    assert learning_rate_at(7, 1.0, 0.1, warmup_steps=3, max_steps=7) == 0.1


def test_without_a_floor_the_rate_ends_at_zero():
    assert learning_rate_at(7, 1.0, 0.0, warmup_steps=3, max_steps=7) == 0.0


def test_past_the_end_the_floor_stays():
    rates = {learning_rate_at(step, 1.0, 0.1, 3, 7) for step in (7, 8, 14, 700)}
    assert rates == {0.1}


def test_the_last_update_of_a_run_still_learns():
    assert learning_rate_at(999, 2e-5, 0.0, warmup_steps=100, max_steps=1000) > 0


def test_a_floor_as_high_as_the_peak_keeps_the_rate():
    assert {learning_rate_at(step, 0.3, 0.3, 0, 9) for step in range(12)} == {0.3}


@given(shape=shapes())
@any_speed
def test_it_rises_strictly_until_the_peak(shape):
    rates = [learning_rate_at(step, *shape) for step in range(shape.warmup_steps + 1)]
    assert all(before < after for before, after in itertools.pairwise(rates))


@given(shape=shapes())
@any_speed
def test_it_never_rises_after_the_peak(shape):
    steps = range(shape.warmup_steps, shape.max_steps + 3)
    rates = [learning_rate_at(step, *shape) for step in steps]
    assert all(before >= after for before, after in itertools.pairwise(rates))


@given(shape=shapes(), step=st.integers(0, 3000))
@any_speed
def test_it_stays_above_zero_and_below_the_peak(shape, step):
    assume(shape.floor > 0)
    assert 0 < learning_rate_at(step, *shape) <= shape.peak * (1 + 1e-15)


@given(shape=shapes(), step=st.integers(0, 3000))
@any_speed
def test_after_the_warm_up_it_stays_above_the_floor(shape, step):
    assert learning_rate_at(shape.warmup_steps + step, *shape) >= shape.floor


@given(shape=shapes(), step=st.integers(0, 3000))
@any_speed
def test_it_never_jumps(shape, step):
    """The warm-up rises by peak / (warmup_steps + 1); a cosine is at most pi / 2 steep."""
    change = learning_rate_at(step + 1, *shape) - learning_rate_at(step, *shape)
    rise = shape.peak / (shape.warmup_steps + 1)
    fall = (shape.peak - shape.floor) * math.pi / 2 / (shape.max_steps - shape.warmup_steps)
    assert -fall - 1e-12 * shape.peak <= change <= rise + 1e-12 * shape.peak


@given(shape=shapes(), share=st.floats(0, 1))
@any_speed
def test_the_cosine_is_symmetric_about_its_middle(shape, share):
    length = shape.max_steps - shape.warmup_steps
    offset = int(share * length)
    early = learning_rate_at(shape.warmup_steps + offset, *shape)
    late = learning_rate_at(shape.max_steps - offset, *shape)
    assert early + late == pytest.approx(shape.peak + shape.floor, rel=1e-12)


@given(shape=shapes(), step=st.integers(0, 3000), factor=st.sampled_from([2.0, 0.5, 8.0]))
@any_speed
def test_it_scales_with_its_peak_and_floor(shape, step, factor):
    """Powers of 2 only shift the exponent, so that equality is exact."""
    scaled = Shape(shape.peak * factor, shape.floor * factor, *shape[2:])
    assert learning_rate_at(step, *scaled) == factor * learning_rate_at(step, *shape)


def test_the_example_in_the_module_is_true():
    results = doctest.testmod(qloop.schedule)
    assert results.attempted >= 1
    assert results.failed == 0
