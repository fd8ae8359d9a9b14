from __future__ import annotations

import pytest

from orchestrator.scaling.kpa import Kpa, KpaMemory
from tests.orchestrator.scaling.test_autoscaler import SITE, Film


def kpa(target: float, max_up_rate: float = 10.0, max_down_rate: float = 10.0) -> Kpa:
    """As in Knative's own tests: a target as it is, rates of 10, panic at twice."""
    return Kpa(SITE, concurrency=target, utilisation=1.0, max_up_rate=max_up_rate, max_down_rate=max_down_rate)


@pytest.mark.parametrize(
    ("policy", "ready", "stable", "panic", "panicking", "wanted"),
    [
        (kpa(10), 1, 50, 50, None, 5),
        (kpa(10), 5, 50, 50, None, 5),
        (kpa(10), 1, 50, 100, None, 10),
        (kpa(1), 5, 50, 30, 5, 50),
        (kpa(1), 5, 20, 30, 5, 30),
        (kpa(1, max_up_rate=1.1), 2, 3, 3.1, None, 3),
        (kpa(10, max_down_rate=1.1), 100, 1, 1, None, 90),
        (kpa(10), 1, 1000, 1001, None, 10),
        (kpa(10), 10, 1000, 1001, None, 100),
        (kpa(10), 100, 1, 1, None, 10),
        (kpa(10), 0, 1000, 888, None, 10),
        (kpa(10), 1, 0, 0, None, 1),
    ],
    ids=[
        "stable",
        "already scaled",
        "panic takes precedence",
        "in panic, stable is larger",
        "in panic, stable is smaller",
        "a small rate up adds one at least",
        "a small rate down",
        "ten times at most",
        "and ten times again",
        "a tenth at least",
        "none ready counts as one",
        "one where Knative would go to zero",
    ],
)
def test_the_table_of_knatives_own_tests(
    policy: Kpa, ready: int, stable: float, panic: float, panicking: int | None, wanted: int
) -> None:
    memory = KpaMemory(95.0) if panicking is None else KpaMemory(95.0, (), 95.0, panicking)
    assert policy.scale(memory, 100.0, ready, stable, panic)[1] == wanted


def test_panic_lasts_a_stable_window_from_when_it_was_last_due() -> None:
    """TestAutoscalerUnpanicAfterSlowIncrease, and ExtendPanicWindow."""
    memory, wanted = kpa(1).scale(KpaMemory(0.0), 0.0, 10, 11, 25)
    assert (wanted, memory.panic_since) == (25, 0.0)
    later, wanted = kpa(1).scale(memory, 30.0, 40, 30, 41)
    assert (wanted, later.panic_since) == (41, 0.0)
    later, wanted = kpa(1).scale(later, 62.0, 55, 50, 56)
    assert (wanted, later.panic_since) == (50, None)
    later, wanted = kpa(1).scale(memory, 30.0, 40, 30, 80)
    assert (wanted, later.panic_since) == (80, 30.0)


def test_windows_of_samples_and_a_look_every_other_second() -> None:
    film = Film(Kpa(SITE, concurrency=1.0))
    for t in range(60):
        assert film.see(t, inflight=1.4) == 2
    film.see(60, inflight=14.0)
    film.see(62, inflight=14.0)
    assert film.see(63, inflight=14.0) < 20, "between two looks"
    assert film.see(66, inflight=14.0) == 20, "6 s at 14 / 0.7"
    for t in range(68, 128, 2):
        assert film.see(t, inflight=1.4) == 20, "in panic nothing is taken away"
    assert film.see(128, inflight=1.4) == 10, "more than 60 s after twice of what was ready was wanted; half at a look"
    assert film.see(129, inflight=1.4) == 10
    assert film.see(130, inflight=1.4) == 5
    assert film.see(132, inflight=1.4) == 2


def test_it_begins_in_panic_so_that_a_lack_of_history_takes_nothing_away() -> None:
    film = Film(Kpa(SITE))
    film.on = {**film.on, "pool": {"a": 4, "b": 4}}
    assert {film.see(t, inflight=1.0) for t in range(0, 62, 2)} == {8}
    assert film.see(62, inflight=1.0) == 4


def test_its_own_default_is_a_hundred_requests_for_a_replica() -> None:
    film = Film(Kpa(SITE))
    for t in range(0, 140, 2):
        wanted = film.see(t, inflight=69.0)
    assert wanted == 1
