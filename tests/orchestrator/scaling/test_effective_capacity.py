from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.scaling import effective_capacity as ec
from orchestrator.scaling import queueing
from orchestrator.scaling.effective_capacity import Arrivals, NoBound, Service

rates = st.floats(0.0, 200.0)
loads = st.builds(Arrivals, rates, st.floats(0.0, 5.0), st.floats(0.0, 20.0))
laws = st.builds(Service, st.floats(0.001, 0.5), st.floats(0.0, 4.0), st.sampled_from([1, 2, 4, 8]))
epsilons = st.floats(1e-4, 0.5)
prefactors = st.sampled_from(["kingman", "erlang_c"])


@pytest.mark.parametrize(
    ("theta", "value"), [(0.01, 1.990066), (0.1, 1.906204), (0.5, 1.621860), (1, 1.386294), (2, 1.098612), (5, 0.716704)]
)
def test_the_effective_capacity_of_a_gamma_rate(theta: float, value: float) -> None:
    assert ec.gamma_capacity(2.0, 1.0, 1.0, theta) == pytest.approx(value, abs=1e-6)
    assert ec.gamma_capacity(2.0, 1.0, 1.0, 0.0) == 2.0


@pytest.mark.parametrize(("theta", "value"), [(0.01, 0.660312), (0.5, 0.346111), (1, 0.204324), (2, 0.109098)])
def test_the_effective_capacity_of_an_on_off_server(theta: float, value: float) -> None:
    chain = [[0.8, 0.2], [0.1, 0.9]]
    assert ec.markov_capacity(chain, [0.0, 1.0], 1.0, theta) == pytest.approx(value, abs=1e-6)
    assert value < 2 / 3 < ec.markov_bandwidth(chain, [0.0, 1.0], 1.0, theta)


@pytest.mark.parametrize(("theta", "value"), [(0.01, 3.01505), (0.1, 3.155128), (0.5, 3.892328), (1, 5.154845)])
def test_the_effective_bandwidth_of_poisson_arrivals(theta: float, value: float) -> None:
    assert Arrivals(3.0).bandwidth(theta) == pytest.approx(value, abs=1e-5)
    assert Arrivals(3.0).bandwidth(0.0) == 3.0


@given(st.floats(0.001, 3.0), loads, laws)
def test_bandwidth_rises_from_the_mean_and_capacity_falls_from_it(theta: float, load: Arrivals, law: Service) -> None:
    assert load.rate <= load.bandwidth(theta) * (1 + 1e-12) <= load.bandwidth(1.1 * theta) * (1 + 1e-9)
    assert law.capacity(1.1 * theta) <= law.capacity(theta) * (1 + 1e-12) <= law.capacity(0.0) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("dispersion", "cv2", "eta"),
    [(1, 1, 0.2), (1, 0, 0.430842), (1, 0.5, 0.273350), (0, 1, 0.371370)],
    ids=["MM", "MD", "ME2", "DM"],
)
def test_the_decay_of_the_wait_behind_one_server(dispersion: float, cv2: float, eta: float) -> None:
    load, law = Arrivals(0.8, dispersion), Service(1.0, cv2)
    assert ec.decay(load, law, 1) == pytest.approx(eta, abs=1e-6)
    theta = ec.exponent_of(load.bandwidth, law.capacity, 10.0)
    assert theta * law.capacity(theta) == pytest.approx(eta, abs=1e-6), "the long way gives the same"


@pytest.mark.parametrize(
    ("a", "shape", "beta", "theta"), [(1.5, 2, 1, 0.733601), (0.8, 2, 0.5, 1.077106), (0.5, 1, 1, 2.512862)]
)
def test_the_exponent_of_a_constant_stream_into_a_gamma_rate(a: float, shape: float, beta: float, theta: float) -> None:
    found = ec.exponent_of(lambda _: a, lambda t: ec.gamma_capacity(shape, beta, 1.0, t), 50.0)
    assert found == pytest.approx(theta, abs=1e-6)


@given(st.integers(1, 60), st.floats(0.05, 0.98))
def test_many_exponential_servers_decay_exactly(servers: int, utilisation: float) -> None:
    rate = utilisation * servers / 0.2
    assert ec.decay(Arrivals(rate), Service(0.2), servers) == pytest.approx(servers / 0.2 - rate, rel=1e-6)
    exact = queueing.mmc_wait_tail(rate, 0.2, servers, 0.1)
    assert ec.late_probability(Arrivals(rate), Service(0.2), servers, 0.1) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("wait", [0.0, 0.5, 1.0, 2.0, 5.0, 20.0])
def test_kingmans_prefactor_bounds_md1_where_erlangs_does_not(wait: float) -> None:
    exact = queueing.md1_wait_tail(0.8, 1.0, wait)
    assert ec.late_probability(Arrivals(0.8), Service(1.0, 0.0), 1, wait, prefactor="kingman") >= exact
    if wait == 2.0:
        assert ec.late_probability(Arrivals(0.8), Service(1.0, 0.0), 1, wait) == pytest.approx(0.338, abs=5e-4)


def test_the_bound_holds_along_a_simulated_path() -> None:
    """Lindley's recursion, groups of 3 into gamma service: the first of each group waits no longer than Kingman says."""
    rng = np.random.default_rng(7)
    load, law, n, wait = Arrivals(0.7, 3.0), Service(1.0, 0.5), 100_000, 0.0
    work = rng.gamma(3 / 0.5, 0.5, n)
    gaps = rng.exponential(3 / 0.7, n)
    waited = np.empty(n)
    for i in range(n):
        waited[i] = wait
        wait = max(0.0, wait + work[i] - gaps[i])
    eta = ec.decay(load, law, 1)
    for x in (1.0, 3.0, 6.0, 12.0, 20.0):
        assert np.mean(waited > x) <= math.exp(-eta * x) * 1.05


@pytest.mark.parametrize(("offered", "replicas"), [(0.5, 2), (2, 5), (10, 14), (50, 55)])
def test_the_staffing_table(offered: float, replicas: int) -> None:
    assert ec.least_replicas(Arrivals(offered), Service(1.0), 0.5, 0.05, most=1000) == replicas


def staffed(load: Arrivals, law: Service, budget: float, epsilon: float, **options: object) -> float:
    found = ec.least_replicas(load, law, budget, epsilon, most=2000, **options)  # type: ignore[arg-type]
    return math.inf if isinstance(found, NoBound) else found


@given(loads, laws, st.floats(0.0, 1.0), epsilons, st.floats(1.0, 2.0), st.floats(0.0, 50.0), prefactors)
@example(Arrivals(5e-324, 0.5), Service(0.5, cv2=0.0, batch=1), 0.5, 0.05, 2.0, 0.0, "kingman")
@example(Arrivals(5e-324, 0.1), Service(0.5, cv2=4.0, batch=1), 0.5, 0.05, 2.0, 0.0, "kingman")
def test_more_load_or_a_stricter_promise_never_takes_fewer(
    load: Arrivals, law: Service, budget: float, epsilon: float, more: float, backlog: float, prefactor: str
) -> None:
    base = staffed(load, law, budget, epsilon, prefactor=prefactor)
    busier = Arrivals(load.rate * more, load.dispersion, load.rate_sd)
    assert staffed(busier, law, budget, epsilon, prefactor=prefactor) >= base
    assert staffed(load, law, budget, epsilon / more, prefactor=prefactor) >= base
    assert staffed(load, law, budget / more, epsilon, prefactor=prefactor) >= base
    assert staffed(load, law, budget, epsilon, prefactor=prefactor, backlog=backlog) >= base


@given(loads, laws, st.floats(0.0, 1.0), epsilons, st.floats(0.0, 50.0))
def test_the_answer_keeps_the_promise_and_one_fewer_does_not(
    load: Arrivals, law: Service, budget: float, epsilon: float, backlog: float
) -> None:
    found = ec.least_replicas(load, law, budget, epsilon, most=2000, backlog=backlog)
    if isinstance(found, int):
        assert ec.late_probability(load, law, found, budget, backlog=backlog) <= epsilon
        assert found == 0 or ec.late_probability(load, law, found - 1, budget, backlog=backlog) > epsilon


def test_what_cannot_be_said_is_named() -> None:
    law = Service(0.1)
    assert ec.wait_tail(None, law, 3, 0.1) == NoBound("no data", "no arrivals were measured")
    assert ec.wait_tail(Arrivals(5.0), None, 3, 0.1) == NoBound("no data", "no service times were measured")
    assert ec.wait_tail(Arrivals(40.0), law, 3, 0.1) == NoBound("unstable", "4 erlang are offered to 3 replicas")
    heavy = NoBound("heavy tail", "seen")
    assert ec.wait_tail(Arrivals(5.0), heavy, 3, 0.1) == heavy
    assert ec.wait_tail(Arrivals(5.0), law, 1, 0.1) == pytest.approx(math.exp(-0.5))
    few = ec.least_replicas(Arrivals(40.0), law, 0.1, 0.05, most=3)
    assert isinstance(few, NoBound)
    assert few.reason == "unstable"
    tight = ec.least_replicas(Arrivals(29.0), law, 0.1, 0.05, most=3)
    assert isinstance(tight, NoBound)
    assert tight.reason == "out of reach"


def test_nobody_waits_where_nothing_varies_and_nothing_comes() -> None:
    assert ec.decay(Arrivals(0.8, 0.0), Service(1.0, 0.0), 1) == math.inf
    assert ec.late_probability(Arrivals(0.0), Service(1.0), 0, 0.1) == 0.0
    assert ec.least_replicas(Arrivals(0.0), Service(1.0), 0.1, 0.01, most=9) == 0


def test_batches_serve_more_and_a_start_delay_leaves_a_backlog() -> None:
    assert ec.decay(Arrivals(8.0), Service(0.4, 1.0, 4), 1) == pytest.approx(2.0)
    assert ec.backlog_after(10.0, Arrivals(30.0), Service(0.1), 2, 1.5) == pytest.approx(25.0)
    assert ec.backlog_after(10.0, Arrivals(5.0), Service(0.1), 2, 1.5) == 0.0
    assert ec.over_delay(3.0, 1.0, 3.0) == pytest.approx(6.0)
