from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.costs import Prices
from orchestrator.scaling import queueing
from orchestrator.scaling.oracle import Oracle, fewest, foresight, visits
from orchestrator.scaling.site import Law, Promise, Site
from tests.orchestrator.scaling.test_autoscaler import SITE, Film

LAW = Law(0.1, start_s=2.0)


@pytest.mark.parametrize(
    ("coming", "wait_s", "here", "wanted"),
    [
        ((0, 0, 0), 0.5, 0.0, 1),
        ((6,), 0.0, 0.0, 6),
        ((6,), 0.1, 0.0, 3),
        ((6,), 0.2, 0.0, 2),
        ((6,), 0.5, 0.0, 1),
        ((1, 1, 1), 0.0, 0.0, 1),
        ((2, 2, 2), 0.0, 0.0, 2),
        ((3, 1, 0), 0.1, 0.0, 2),
        ((1,), 0.1, 5.0, 3),
    ],
)
def test_by_hand(coming: tuple[int, ...], wait_s: float, here: float, wanted: int) -> None:
    """Steps of 0.1 s, tasks of 0.1 s: one of n that come at once waits (n / replicas - 1) 0.1 s."""
    assert fewest(coming, 0.1, LAW, wait_s, 0.05, here=here) == wanted


def test_times_that_vary_need_more() -> None:
    steady = fewest((2,) * 20, 0.1, LAW, 0.05, 0.01, slot=10)
    varying = fewest((2,) * 20, 0.1, replace(LAW, cv2=1.0), 0.05, 0.01, slot=10)
    assert (steady, varying) == (2, 5)
    assert queueing.mmc_wait_tail(20.0, 0.1, 5, 0.05) > 0.01 > queueing.mmc_wait_tail(20.0, 0.1, 6, 0.05), "not known: 6"


def test_batches_and_slots_count_as_more_servers() -> None:
    assert fewest((12,), 0.1, Law(0.1, slots=2), 0.0, 0.05) == 6
    assert fewest((12,), 0.1, Law(0.1, per_request_s=0.025, max_batch=4), 0.0, 0.05) == 3


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(0, 29), st.integers(1, 5), st.floats(0.0, 2.0))
def test_more_tasks_never_need_fewer(coming: list[int], at: int, more: int, cv2: float) -> None:
    law = replace(LAW, cv2=cv2)
    busier = [count + (more if i == at else 0) for i, count in enumerate(coming)]
    assert 1 <= fewest(coming, 0.1, law, 0.2, 0.05) <= fewest(busier, 0.1, law, 0.2, 0.05)


def site(start: float = 1.0) -> Site:
    return replace(SITE, laws={"pool": LAW}, promises={"p": Promise(0.1, 0.05, (("pool",),))}, prices=Prices(1.0, 0.1, start))


def test_it_orders_a_start_delay_ahead_and_keeps_what_is_cheaper_to_keep() -> None:
    """Eight at once at 10 s: with 2 s to start and a slot of 1 s, ordered at 8 s, or else ready for the slot from 7 s on."""
    arrivals = {"pool": tuple(8 if t in (100, 130) else 0 for t in range(300))}
    film = Film(Oracle(site(), arrivals, step_s=0.1))
    seen = [film.see(t, 0.0, queue_length=0.0, service_s=0.1) for t in range(18)]
    assert seen == [1] * 8 + [8] * 6 + [1] * 4
    film = Film(Oracle(site(0.0), arrivals, step_s=0.1))
    assert [film.see(t, 0.0, queue_length=0.0, service_s=0.1) for t in range(18)] == [1] * 8 + [8] * 6 + [1] * 4
    sparse = {"pool": tuple(8 if t in (100, 150) else 0 for t in range(300))}
    cheap, dear = (Film(Oracle(site(start), sparse, step_s=0.1)) for start in (0.0, 3.0))
    assert [cheap.see(t, 0.0, queue_length=0.0, service_s=0.1) for t in range(9, 14)] == [8, 8, 1, 1, 8]
    assert [dear.see(t, 0.0, queue_length=0.0, service_s=0.1) for t in range(9, 14)] == [8, 8, 8, 8, 8]


def test_its_clock_may_begin_anywhere_and_ends_with_what_it_knows() -> None:
    film = Film(Oracle(site(), {"pool": (0,) * 40 + (9,)}, step_s=0.1, origin_s=1000.0))
    assert film.see(990.0, 0.0, queue_length=0.0, service_s=0.1) == 1
    assert film.see(1002.0, 0.0, queue_length=0.0, service_s=0.1) == 9
    assert film.see(1010.0, 0.0, queue_length=0.0, service_s=0.1) == 1


def test_visits_follow_the_ways_and_joins_wait_for_the_latest() -> None:
    laws = {"a": Law(0.1), "b": Law(0.3), "c": Law(0.2)}
    promise = Promise(1.0, 0.05, (("a", "c"), ("b", "c")), (0.02, 0.04))
    assert dict(visits(promise, laws)) == pytest.approx({"a": 0.01, "b": 0.02, "c": 0.34})
    twice = Promise(1.0, 0.05, (("a", "b", "a"),))
    assert visits(twice, laws) == (("a", 0.0), ("a", 0.4), ("b", 0.1))
    apart = Promise(1.0, 0.05, (("a", "c"), ("a", "b")), visits={"a": 2})
    assert [at for name, at in visits(apart, laws) if name == "a"] == [0.0, 0.0]


def test_foresight_counts_every_visit() -> None:
    found = foresight({"p": [0.0, 0.05, 0.31], "q": [0.1]}, {"p": (("a", 0.0), ("b", 0.1)), "q": (("a", 0.0),)}, 0.1)
    assert found == {"a": (2, 1, 0, 1), "b": (0, 2, 0, 0, 1)}
    assert foresight({"p": [1.0]}, {}, 0.1) == {}


@given(st.lists(st.floats(0.0, 50.0), min_size=1, max_size=50), st.floats(0.01, 2.0))
def test_foresight_loses_nobody(times: list[float], step_s: float) -> None:
    assert sum(foresight({"p": times}, {"p": (("a", 0.5),)}, step_s)["a"]) == len(times)
