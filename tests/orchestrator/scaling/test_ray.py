from __future__ import annotations

import pytest

from orchestrator.scaling.ray import Ray
from tests.orchestrator.scaling.test_autoscaler import SITE, Film


@pytest.mark.parametrize(
    ("target", "factor", "ongoing", "replicas", "wanted"),
    [
        (5.0, 1.0, 20, 4, 4),
        (5.0, 1.0, 100, 4, 20),
        (5.0, 1.0, 10, 4, 2),
        (1.0, 1.0, 123, 3, 123),
        (50.0, 1.0, 100, 1, 2),
        (50.0, 1.0, 40, 2, 1),
        (1.0, 0.5, 10, 4, 7),
        (1.0, 2.0, 10, 4, 16),
        (1.0, 0.2, 0, 5, 4),
        (1.0, 0.2, 0, 4, 4 - 1),
        (1.0, 0.2, 3.5, 4, 4),
    ],
)
def test_wishes_of_rays_own_tests(target: float, factor: float, ongoing: float, replicas: int, wanted: int) -> None:
    """The first six and the ninth are its unit tests' numbers; with a factor below 1, no count is one it cannot leave."""
    assert Ray(SITE, target, up_factor=factor, down_factor=factor).wish(ongoing, replicas) == wanted


def test_it_waits_for_its_delays_and_smooths() -> None:
    film = Film(Ray(SITE, up_delay_s=3.0, down_delay_s=6.0, look_back_s=1.0, up_factor=0.5, metrics_interval_s=0.0))
    assert [film.see(t, inflight=12.0) for t in (0, 1, 2, 3)] == [2, 2, 2, 4], "half of the way from 2 to 6"
    assert film.see(4, inflight=1.0) == 4
    assert film.see(5, inflight=8.0) == 4, "a break: the delay starts anew"
    assert [film.see(t, inflight=1.0) for t in range(6, 13)] == [4, 4, 4, 4, 4, 4, 1]


def test_stock_reports_every_ten_seconds_and_acts_thirty_later() -> None:
    film = Film(Ray(SITE))
    assert {film.see(t, inflight=4.0) for t in range(5)} == {2}
    assert {film.see(t, inflight=20.0) for t in range(5, 40)} == {2}, "the report at 10 tells of it first"
    assert film.see(40, inflight=20.0) == 10, "all of the last 30 s at 20, two for each"


def test_it_shrinks_by_one_where_the_factor_alone_would_keep_it() -> None:
    film = Film(Ray(SITE, down_delay_s=0.0, down_factor=0.1))
    assert film.see(0, inflight=1.0) == 1


def test_replicas_that_start_do_not_count_as_there() -> None:
    """test_replicas_delayed_startup: what is wanted is compared with the target, and computed from what runs."""
    film = Film(Ray(SITE, ongoing=1.0, up_delay_s=0.0, metrics_interval_s=0.0, look_back_s=0.5))
    assert film.see(0, inflight=20.0) == 20
    film.on = {**film.on, "pool": {"a": 1, "b": 1}}
    assert film.see(1, inflight=20.0) == 20
    film.on = {**film.on, "pool": {"a": 3, "b": 1}}
    assert film.see(2, inflight=30.0) == 30
    assert film.see(3, inflight=10.0) == 30, "not before 600 s"
