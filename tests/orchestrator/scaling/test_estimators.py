from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.scaling import estimators
from orchestrator.scaling.effective_capacity import NoBound, Service, gamma_capacity
from orchestrator.scaling.estimators import RateState


def test_a_constant_is_estimated_exactly_and_nothing_overflows() -> None:
    found = estimators.log_mgf([1000.0] * 50, 1.0)
    assert (found.value, found.sd, found.certified) == (1000.0, 0.0, True)
    assert estimators.capacity([3.0] * 50, 0.5, 2.0) == pytest.approx(6.0)
    assert estimators.bandwidth([3.0] * 50, 0.5, 2.0) == pytest.approx(6.0)


@pytest.mark.parametrize(("n", "bias"), [(30, 0.036), (100, 0.008), (300, 0.001)])
def test_the_plug_in_estimate_errs_as_much_as_is_known(n: int, bias: float) -> None:
    """Gamma(2, 1), theta = 5: the truth is 0.7167, and the means of 4,000 estimates lie so much above it."""
    draws = np.random.default_rng(1).gamma(2.0, 1.0, (4000, n))
    found = [-estimators.log_mgf(row.tolist(), -5.0).value / 5.0 for row in draws]
    spread = float(np.std(found)) / math.sqrt(len(found))
    assert np.mean(found) - gamma_capacity(2.0, 1.0, 1.0, 5.0) == pytest.approx(bias, abs=3 * spread + 0.002)


def test_a_certified_capacity_is_below_the_truth_and_a_bandwidth_above() -> None:
    rng = np.random.default_rng(2)
    low = [estimators.capacity(rng.gamma(2.0, 1.0, 300).tolist(), 1.0, 1.0) for _ in range(200)]
    assert np.mean([isinstance(x, float) and x < gamma_capacity(2.0, 1.0, 1.0, 1.0) for x in low]) > 0.9
    high = [estimators.bandwidth(rng.poisson(3.0, 300).astype(float).tolist(), 1.0, 0.3) for _ in range(200)]
    assert np.mean([isinstance(x, float) and x > 3.0 * math.expm1(0.3) / 0.3 for x in high]) > 0.9


def test_a_weight_that_rests_on_few_samples_is_refused() -> None:
    work = (np.random.default_rng(3).pareto(1.8, 1000) + 1.0).tolist()
    found = estimators.bandwidth(work, 1.0, 1.0)
    assert isinstance(found, NoBound)
    assert found.reason == "heavy tail"
    for few, reason in (([], "no data"), ([1.0] * 5, "few samples")):
        refused = estimators.capacity(few, 1.0, 1.0)
        assert isinstance(refused, NoBound)
        assert refused.reason == reason


def test_the_dispersion_of_counts() -> None:
    rng = np.random.default_rng(4)
    assert estimators.dispersion(rng.poisson(9.0, 5000).tolist()) == pytest.approx(1.0, abs=0.06)
    assert estimators.dispersion((3.0 * rng.poisson(3.0, 5000)).tolist()) == pytest.approx(3.0, abs=0.2)
    assert isinstance(estimators.dispersion([0.0] * 99), NoBound)
    assert isinstance(estimators.dispersion([1.0] * 9), NoBound)


def test_the_law_of_service_times() -> None:
    samples = np.random.default_rng(5).gamma(4.0, 0.01, 2000)
    law = estimators.service_law(samples.tolist(), batch=2)
    assert isinstance(law, Service)
    assert law.mean_s == pytest.approx(0.04, rel=0.05)
    assert law.cv2 == pytest.approx(0.25, rel=0.15)
    assert law.batch == 2
    constant = estimators.service_law([0.02] * 100)
    assert isinstance(constant, Service)
    assert constant.cv2 == pytest.approx(0.0, abs=1e-12)
    assert isinstance(estimators.service_law([]), NoBound)
    assert isinstance(estimators.service_law([0.1] * 29), NoBound)


def test_heavy_tails_are_told_from_exponential_ones() -> None:
    rng = np.random.default_rng(6)
    called = [estimators.heavy_tail(rng.exponential(1.0, 500).tolist()) is not None for _ in range(200)]
    assert np.mean(called) < 0.05
    called = [estimators.heavy_tail(rng.pareto(1.8, 500).tolist()) is not None for _ in range(200)]
    assert np.mean(called) > 0.7


def test_a_rate_is_followed_at_once_upward_and_slowly_downward() -> None:
    """t = 1..20: 10/s; t = 21: 40/s, no chance; t = 22: 10/s, which may be."""
    state = RateState()
    for _ in range(20):
        state = estimators.track(state, 10.0, 1.0, memory_s=2.0)
    assert state.rate == pytest.approx(10.0)
    assert state.error_sd == 0.0
    state = estimators.track(state, 40.0, 1.0, memory_s=2.0)
    assert state.rate == 40.0
    assert state.error_sd > 0.0
    assert estimators.track(state, 10.0, 1.0, memory_s=2.0).rate == pytest.approx(40.0 - 30.0 * (1 - math.exp(-0.5)))


def test_the_error_of_a_poisson_forecast_is_small_and_of_a_wandering_rate_is_not() -> None:
    rng = np.random.default_rng(8)
    steady = wandering = RateState()
    for slot in range(500):
        steady = estimators.track(steady, float(rng.poisson(50.0)), 1.0, memory_s=2.0)
        wandering = estimators.track(wandering, float(rng.poisson(50.0 + 30.0 * (slot // 5 % 2))), 1.0, memory_s=2.0)
    assert steady.error_sd < 7.0
    assert wandering.error_sd > 10.0
