from __future__ import annotations

import pytest

from orchestrator.scaling.hpa import Behavior, Hpa, Keda
from tests.orchestrator.scaling.test_autoscaler import SITE, Film

EVERY_SECOND = Behavior(sync_s=1.0)


@pytest.mark.parametrize(
    ("ready", "load", "target", "wanted", "why"),
    [
        (2, 0.2 * 2, 0.1, 4, "documentation: 200m where 100m is desired doubles"),
        (4, 0.05 * 4, 0.1, 2, "documentation: 50m where 100m is desired halves"),
        (50, 0.9 * 50, 0.75, 60, "v1.33 announcement: 50 replicas at 90 % where 75 % is desired become 60"),
        (10, 0.55 * 10, 0.5, 10, "documentation: within the tolerance of 0.1"),
        (1, 3.05, 0.5, 5, "walkthrough: 305 % of 50 % wants 7; four pods at once are the limit"),
    ],
)
def test_worked_numbers(ready: int, load: float, target: float, wanted: int, why: str) -> None:
    film = Film(Hpa(SITE, utilisation=target, behavior=Behavior(down_window_s=0.0)))
    film.on = {**film.on, "pool": {"a": ready - ready // 2, "b": ready // 2}}
    assert film.see(0, 1.0, service_s=load) == wanted, why


def test_it_keeps_within_its_tolerance_grows_at_once_and_shrinks_after_its_window() -> None:
    film = Film(Hpa(SITE, utilisation=0.5))
    assert film.see(0, 10, service_s=0.109) == 2, "1.09 of 1.0: within a tenth"
    assert film.see(15, 10, service_s=0.2) == 4
    assert film.see(20, 10, service_s=0.9) == 4, "it looks every 15 s"
    assert film.see(30, 10, service_s=2.0) == 8, "40 wanted; four pods or double, whichever is more"
    assert film.see(45, 10, service_s=2.0) == 16
    for t in range(60, 345, 15):
        assert film.see(t, 1, service_s=0.1) == 16
    assert film.see(345, 1, service_s=0.1) == 1, "the last high proposal was at 45"


def test_the_limit_on_growth_counts_what_was_added_in_the_period() -> None:
    film = Film(Hpa(SITE, utilisation=0.5, behavior=EVERY_SECOND))
    assert [film.see(t, 10, service_s=2.0) for t in (0, 1, 14, 15)] == [6, 6, 6, 12]


def test_replicas_that_are_not_ready_are_taken_to_idle_where_it_would_grow() -> None:
    film = Film(Hpa(SITE, utilisation=0.5, behavior=EVERY_SECOND))
    assert film.see(0, 10, service_s=0.2) == 4
    film.on = {**film.on, "pool": {"a": 1, "b": 1}}
    assert film.see(1, 10, service_s=0.2) == 4, "two are ready, and busy all the time; two more are on their way"


def test_replicas_that_are_not_ready_are_left_out_where_it_would_shrink() -> None:
    film = Film(Hpa(SITE, utilisation=0.5, behavior=Behavior(sync_s=1.0, down_window_s=0.0)))
    assert film.see(0, 10, service_s=0.2) == 4
    film.on = {**film.on, "pool": {"a": 1, "b": 1}}
    assert film.see(1, 2, service_s=0.2) == 1, "0.4 of 2 ready at 0.5"


def test_requests_computed_together_keep_a_replica_busy_once() -> None:
    film = Film(Hpa(SITE, utilisation=0.5, behavior=EVERY_SECOND))
    assert film.see(0, 40, service_s=0.1, batch_size=4.0) == 2


def test_keda_divides_the_queue() -> None:
    """KEDA's documentation of its SQS scaler: 30 messages at 10 for a pod are 3 pods."""
    film = Film(Keda(SITE, queue_length=10.0, behavior=EVERY_SECOND))
    assert film.see(0, inflight=30.0) == 3
    assert film.see(1, inflight=32.0) == 3, "within a tenth"
    assert film.see(2, inflight=34.0) == 4
    assert film.see(3, inflight=2.0) == 4
    assert film.see(303, inflight=2.0) == 1
    assert film.see(603, inflight=0.0) == 1, "never none"
