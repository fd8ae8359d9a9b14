"""The estimate of a batch's service time: the line it starts from, and how it follows what it sees."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import ServiceLaw
from services.dataplane.service_time import DOUBTS, WINDOW, ServiceEstimate

LAW = ServiceLaw(base_s=0.002, per_unit_s=1e-5, tail_ratio=1.5)


# --- the estimate ---------------------------------------------------------------------------------------------------------


def observe(estimate: ServiceEstimate, ratio: float, batches: int, units: float = 100) -> None:
    for _ in range(batches):
        estimate.observe(units, ratio * LAW.mean_s(units))


def test_without_observations_the_law_speaks() -> None:
    estimate = ServiceEstimate(LAW)
    assert estimate.mean_s(100) == LAW.mean_s(100)
    assert estimate.tail_s(100) == LAW.tail_s(100)


@pytest.mark.parametrize("ratio", [0.2, 1.0, 3.0, 10.0])
def test_the_estimate_follows_a_shift_in_speed_for_every_size(ratio: float) -> None:
    estimate = ServiceEstimate(LAW)
    observe(estimate, 1.0, 2 * WINDOW)
    observe(estimate, ratio, 2 * WINDOW, units=30)
    for units in (1, 30, 1000):
        assert estimate.mean_s(units) == pytest.approx(ratio * LAW.mean_s(units))
        assert estimate.tail_s(units) == pytest.approx(ratio * LAW.mean_s(units))


def test_the_tail_follows_a_slowdown_within_a_few_batches() -> None:
    estimate = ServiceEstimate(LAW)
    observe(estimate, 1.0, 2 * WINDOW)
    observe(estimate, 5.0, 16)
    assert estimate.tail_s(100) == pytest.approx(5 * LAW.mean_s(100))
    assert estimate.mean_s(100) > 1.4 * LAW.mean_s(100)


@pytest.mark.parametrize("before", [0, 1, 7, 40, 200], ids=lambda n: f"after {n} batches")
@pytest.mark.parametrize("ratio", [10.0, 1e4])
def test_one_outlier_does_not_rule(before: int, ratio: float) -> None:
    estimate = ServiceEstimate(LAW)
    observe(estimate, 1.0, before)
    observe(estimate, ratio, 1)
    for _ in range(WINDOW):
        assert estimate.mean_s(100) < 1.1 * LAW.mean_s(100)
        assert estimate.tail_s(100) <= LAW.tail_s(100)
        observe(estimate, 1.0, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 10)), max_size=150))
def test_the_tail_is_never_below_the_mean_and_both_stay_within_what_was_seen(batches: list[tuple[float, float]]) -> None:
    estimate = ServiceEstimate(LAW)
    ratios = [1.0, LAW.tail_ratio]
    for units, seconds in batches:
        estimate.observe(units, seconds)
        ratios.append(seconds / LAW.mean_s(units))
        mean, tail = estimate.mean_s(50) / LAW.mean_s(50), estimate.tail_s(50) / LAW.mean_s(50)
        assert min(ratios) * (1 - 1e-9) <= mean <= tail * (1 + 1e-9)
        assert tail <= max(ratios) * (1 + 1e-9)


def test_the_tail_is_the_quantile_of_a_known_distribution() -> None:
    estimate = ServiceEstimate(LAW)
    ratios = [1 + i / WINDOW for i in range(WINDOW)]
    random.Random(7).shuffle(ratios)
    for ratio in ratios:
        observe(estimate, ratio, 1)
    assert estimate.tail_s(100) == pytest.approx((1 + 60 / WINDOW) * LAW.mean_s(100))
    assert estimate.mean_s(100) == pytest.approx(1.5 * LAW.mean_s(100), rel=0.03)


def test_tasks_dropped_in_a_row_make_the_estimate_fall_back_to_the_law() -> None:
    estimate = ServiceEstimate(LAW)
    observe(estimate, 20.0, WINDOW)
    for _ in range(DOUBTS - 1):
        estimate.doubt()
    assert estimate.mean_s(100) == pytest.approx(20 * LAW.mean_s(100)), "an overload drops some without being wrong"
    observe(estimate, 20.0, 1)
    for _ in range(DOUBTS - 1):
        estimate.doubt()
    assert estimate.mean_s(100) == pytest.approx(20 * LAW.mean_s(100)), "what was computed between confirms it"
    for _ in range(WINDOW + DOUBTS):
        estimate.doubt()
    assert estimate.mean_s(100) == pytest.approx(LAW.mean_s(100))
