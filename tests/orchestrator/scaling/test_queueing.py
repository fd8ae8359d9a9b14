from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scaling import queueing as q


@pytest.mark.parametrize(
    ("servers", "offered", "waits", "longer_than_one_service"),
    [
        (1, 0.8, 0.8, 0.654985),
        (2, 1.6, 0.711111, 0.476672),
        (4, 3.0, 0.509434, 0.187410),
        (10, 8.0, 0.409180, 0.055377),
        (20, 16.0, 0.256078, 0.004690),
    ],
)
def test_erlang_c_and_the_tail_of_mmc(servers: int, offered: float, waits: float, longer_than_one_service: float) -> None:
    assert q.erlang_c(servers, offered) == pytest.approx(waits, abs=1e-6)
    assert q.mmc_wait_tail(offered, 1.0, servers, 1.0) == pytest.approx(longer_than_one_service, abs=1e-6)


@pytest.mark.parametrize(("servers", "offered"), [(1, 0.5), (5, 3.0), (20, 30.0)])
def test_erlang_b_is_the_truncated_poisson(servers: int, offered: float) -> None:
    weights = [offered**n / math.factorial(n) for n in range(servers + 1)]
    assert q.erlang_b(servers, offered) == pytest.approx(weights[-1] / sum(weights), rel=1e-12)


@pytest.mark.parametrize("servers", [10**4, 10**5])
def test_many_servers_neither_overflow_nor_cancel(servers: int) -> None:
    """Halfin and Whitt's limit: with c = r + sqrt(r), C -> 1 / (1 + Phi(1)/phi(1)) = 0.2234, at the rate 1/sqrt(c)."""
    offered = servers - math.sqrt(servers)
    assert q.erlang_c(servers, offered) == pytest.approx(q.halfin_whitt_delay(1.0), abs=1.0 / math.sqrt(servers))
    assert q.erlang_c(servers, servers / 10) == 0.0


def test_the_tail_of_md1() -> None:
    """For short waits Erlang's alternating sum is good enough; at two service times it has two terms."""
    by_hand = 1 - 0.2 * (math.exp(1.6) - 0.8 * math.exp(0.8))
    assert q.md1_wait_tail(0.8, 1.0, 2.0) == pytest.approx(by_hand, abs=1e-12) == pytest.approx(0.365480, abs=1e-6)
    for wait in (0.0, 0.5, 1.0, 2.5, 7.3):
        terms = ((-0.8 * (wait - k)) ** k / math.factorial(k) * math.exp(0.8 * (wait - k)) for k in range(math.floor(wait) + 1))
        assert q.md1_wait_tail(0.8, 1.0, wait) == pytest.approx(1 - 0.2 * math.fsum(terms), abs=1e-10)


def test_the_far_tail_of_md1_decays_at_its_exponent() -> None:
    """0.430842 per service time (Lundberg)."""
    far, farther = q.md1_wait_tail(0.8, 1.0, 40.0), q.md1_wait_tail(0.8, 1.0, 50.0)
    assert math.log(far / farther) / 10.0 == pytest.approx(0.430842, rel=1e-4)


def test_the_mean_of_md1_is_the_integral_of_its_tail() -> None:
    step = 0.01
    integral = step * (sum(q.md1_wait_tail(0.8, 1.0, i * step) for i in range(1, 6000)) + 0.4)
    assert integral == pytest.approx(q.md1_mean_wait_s(0.8, 1.0), rel=1e-4) == pytest.approx(2.0)


def test_means_agree_where_queues_are_the_same() -> None:
    assert q.mm1_mean_wait_s(0.8, 1.0) == pytest.approx(4.0)
    assert q.mm1_mean_wait_s(0.8, 1.0) == pytest.approx(q.mmc_mean_wait_s(0.8, 1.0, 1))
    assert q.md1_mean_wait_s(0.8, 1.0) == pytest.approx(q.mm1_mean_wait_s(0.8, 1.0) / 2)
    assert q.mm1_wait_tail(0.8, 1.0, 3.0) == pytest.approx(0.8 * math.exp(-0.6))


@given(st.floats(0.01, 0.99), st.integers(1, 30))
def test_littles_law_ties_the_wait_to_the_chain_of_mmc(utilisation: float, servers: int) -> None:
    """L of the birth-death chain is C rho / (1 - rho), counted without W."""
    offered = utilisation * servers
    queued = q.erlang_c(servers, offered) * utilisation / (1 - utilisation)
    assert q.mean_in_queue(offered / 0.2, q.mmc_mean_wait_s(offered / 0.2, 0.2, servers)) == pytest.approx(queued)


@pytest.mark.parametrize("rate", [5.0, 7.0])
def test_a_queue_that_is_not_stable_waits_for_ever(rate: float) -> None:
    assert q.mmc_mean_wait_s(rate, 0.2, 1) == q.mg1_mean_wait_s(rate, 0.2, 0.5) == math.inf
    assert q.mmc_wait_tail(rate, 0.2, 1, 9.0) == q.md1_wait_tail(rate, 0.2, 9.0) == 1.0


def test_no_load_never_waits() -> None:
    assert q.mmc_wait_tail(0.0, 0.2, 1, 0.0) == q.md1_wait_tail(0.0, 0.2, 0.0) == 0.0
    assert q.square_root_staffing(0.0, 2.0) == 0


@given(st.floats(0.001, 1.0))
def test_beta_is_the_inverse_of_the_delay(probability: float) -> None:
    assert q.halfin_whitt_delay(q.halfin_whitt_beta(probability)) == pytest.approx(probability, rel=1e-9)


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1])
def test_beta_of_what_is_no_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        q.halfin_whitt_beta(probability)


@given(st.floats(0.01, 500.0), st.floats(0.0, 4.0))
def test_square_root_staffing_is_stable_and_keeps_its_promise_in_the_limit(offered: float, beta: float) -> None:
    servers = q.square_root_staffing(offered, beta)
    assert offered < servers <= offered + beta * math.sqrt(offered) + 1
