from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from orchestrator.scaling import estimators
from orchestrator.scaling.effective_capacity import NoBound, Service, gamma_capacity
from orchestrator.scaling.estimators import SHIFT, Level, Rates, RateState, Served


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


class TestFollow:
    def test_while_the_rate_is_constant_the_mean_is_exact_and_no_change_is_found(self) -> None:
        level = Level()
        for slot in range(1, 301):
            level = estimators.follow(level, 40.0, 1.0, memory_s=120.0)
            assert level.rate == pytest.approx(40.0)
            assert level.span_s == min(slot, 120.0)
        assert (level.dispersion, level.error_variance) == (1.0, 0.0)
        assert level.standard_error == pytest.approx(math.sqrt(40.0 / 120.0))

    def test_the_mean_is_over_all_since_the_last_change(self) -> None:
        """Counts within chance of 40: no slot of these starts it anew."""
        counts = [38.0, 44.0, 41.0, 35.0, 42.0]
        level = Level()
        for count in counts:
            level = estimators.follow(level, count, 1.0, memory_s=120.0)
        assert level.rate == pytest.approx(np.mean(counts))
        assert level.span_s == 5.0

    @pytest.mark.parametrize(("times", "slots"), [(SHIFT, 2), (3.0, 1), (1.0 / SHIFT, 3), (0.0, 1)])
    def test_a_jump_is_found_within_a_few_slots_and_the_mean_starts_anew(self, times: float, slots: int) -> None:
        """At 50/s each slot of 1.5 times as many is evidence of 75 ln 1.5 - 25 = 5.4; of two thirds, 3.2; 8 are needed."""
        level = Level()
        for _ in range(30):
            level = estimators.follow(level, 50.0, 1.0, memory_s=120.0)
        found = []
        for _ in range(slots):
            level = estimators.follow(level, 50.0 * times, 1.0, memory_s=120.0)
            found.append(level.span_s < 30.0)
        assert found == [False] * (slots - 1) + [True]
        assert level.rate == pytest.approx(50.0 * times)
        assert level.span_s == slots / 2.0

    def test_a_change_too_small_to_be_found_is_forgotten_with_the_memory(self) -> None:
        level = Level(40.0, 120.0)
        for _ in range(600):
            level = estimators.follow(level, 44.0, 1.0, memory_s=120.0)
        assert level.rate == pytest.approx(44.0, abs=0.05)

    @pytest.mark.parametrize("rate", [2.0, 10.0, 80.0])
    def test_poisson_counts_raise_no_more_alarms_than_stated(self, rate: float) -> None:
        """About one in 3000 slots: in 20 runs of 1000, 7; the count of as rare events is within 3 sd of it, 15."""
        alarms = 0
        for seed in range(20):
            level = Level()
            for count in np.random.default_rng(seed).poisson(rate, 1000).tolist():
                before = level
                level = estimators.follow(before, float(count), 1.0, memory_s=120.0)
                alarms += level.span_s < before.span_s
        assert alarms <= 15

    def test_counts_that_vary_more_are_told_by_their_dispersion_and_raise_no_alarm(self) -> None:
        level, spans = Level(), []
        for count in (3.0 * np.random.default_rng(1).poisson(20.0, 1000)).tolist():
            level = estimators.follow(level, count, 1.0, memory_s=120.0)
            spans.append(level.span_s)
        assert 1.5 < level.dispersion < 4.5
        assert sum(after < before for before, after in itertools.pairwise(spans)) <= 3


class TestRates:
    def test_the_quantile_by_hand(self) -> None:
        """90 tasks at 9/s, 10 at 10/s: bins of up to 2^(13/4) = 9.5 and 2^(14/4) = 11.3."""
        rates = Rates(((13, 90.0), (14, 10.0)))
        assert (rates.quantile(0.05), rates.quantile(0.25), rates.quantile(0.0)) == (14, 13, 14)
        assert Rates().quantile(0.1) is None
        assert estimators.rate_of(13) == pytest.approx(9.51, abs=0.01)

    def test_it_rises_at_once_and_falls_where_half_of_epsilon_allows_it(self) -> None:
        often, rare = (Rates(((8, 100.0 - n), (12, n))) for n in (10.0, 2.0))
        assert often.quantile(0.05, now=8) == 12
        assert rare.quantile(0.05, now=12) == 8

    def test_between_half_of_epsilon_and_epsilon_it_stays_where_it_was(self) -> None:
        seldom = Rates(((8, 96.0), (12, 4.0)))
        assert seldom.quantile(0.05) == 8
        assert seldom.quantile(0.05, now=12) == 12
        assert seldom.quantile(0.05, now=20) == 12, "no higher than what came"

    def test_what_is_old_weighs_less_and_a_rate_is_in_the_bin_that_holds_it(self) -> None:
        rates = Rates().add(8.0, 2.0, memory_s=10.0).add(16.0, 1.0, memory_s=10.0).add(0.0, 1.0, memory_s=10.0)
        assert dict(rates.shares) == pytest.approx({12: 16.0 * math.exp(-0.2), 16: 16.0 * math.exp(-0.1)})
        for rate in (0.01, 0.9, 1.0, 7.3, 4000.0):
            ((bin_, _),) = Rates().add(rate, 1.0, 10.0).shares
            assert estimators.rate_of(bin_ - 1) < rate <= estimators.rate_of(bin_) * (1 + 1e-9)

    def test_what_is_long_gone_is_forgotten(self) -> None:
        rates = Rates().add(500.0, 1.0, 10.0)
        for _ in range(400):
            rates = rates.add(1.0, 1.0, 10.0)
        assert [bin_ for bin_, _ in rates.shares] == [0]


class TestServe:
    def test_moments_are_means_over_requests(self) -> None:
        """10 of 20 ms and 30 of 40 ms, none of which vary: mean 35, variance 75, of 35 squared 0.0612."""
        served = estimators.serve(Served(), 10.0, 0.02, 0.0, 1.0)
        assert served.cv2 is None, "ten are few"
        served = estimators.serve(served, 30.0, 0.04, 0.0, 3.0)
        assert served.samples == 40.0
        assert served.mean_s == pytest.approx(0.035)
        assert served.cv2 == pytest.approx(75.0 / 35.0**2)
        assert served.batch == pytest.approx(2.5)

    def test_a_variance_that_was_not_told_is_not_known(self) -> None:
        served = estimators.serve(Served(), 500.0, 0.02, None, None)
        assert (served.mean_s, served.cv2, served.batch) == (0.02, None, 1.0)
        assert estimators.serve(served, 30.0, 0.02, 0.5, None).cv2 is not None

    def test_a_slot_in_which_nothing_was_computed_changes_nothing(self) -> None:
        served = estimators.serve(Served(), 10.0, 0.02, 0.5, None)
        assert estimators.serve(served, 0.0, 9.0, 9.0, 9.0) == served

    def test_what_is_measured_now_replaces_what_was(self) -> None:
        served = estimators.serve(Served(), 5000.0, 0.02, 0.5, 1.0)
        assert served.samples == estimators.REMEMBERED
        for _ in range(20):
            served = estimators.serve(served, 1000.0, 0.04, 1.0, 1.0)
        assert served.mean_s == pytest.approx(0.04, rel=1e-3)
        assert served.cv2 == pytest.approx(1.0, rel=1e-2)
