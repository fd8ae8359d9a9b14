"""The observation, as a film: samples at their times, and what is known then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import Observation, PipelineObservation, Signal
from orchestrator.telemetry import exposition, sources
from orchestrator.telemetry.sources import Endpoint, Source
from tests.orchestrator.telemetry.pages import gateway_page, replica, stage_page, timed_page

ONE, TWO = Endpoint("pool-1", "http://a:1"), Endpoint("pool-2", "http://a:2")
GATEWAY = Endpoint("gateway-1", "http://g:1")
REPLICAS = [replica("pool-1", "http://a:1"), replica("pool-2", "http://a:2")]


class Film:
    """Two replicas and a gateway; each slot says which pages came."""

    def __init__(self) -> None:
        self.sources = {endpoint: Source(100.0) for endpoint in (ONE, TWO, GATEWAY)}

    def slot(self, t: float, pages: dict[Endpoint, str]) -> Observation:
        for endpoint, source in self.sources.items():
            source.begin()
            if endpoint in pages:
                source.take(exposition.parse(pages[endpoint], t))
        return sources.observe(t, t, REPLICAS, [GATEWAY], self.sources)


def signal(seen: Observation) -> Signal:
    found = seen.services["pool"].signal
    assert found is not None
    return found


def test_rates_are_the_growth_of_counters_and_a_silent_replica_ages() -> None:
    """t = 100: first look. t = 102: one served 20, the other 10. t = 104: the second one is silent. t = 106: it is back."""
    film = Film()
    first = film.slot(100.0, {ONE: stage_page(100, 1, 1.0), TWO: stage_page(50, 2, 0.5)})
    assert first.services["pool"].replicas == {"a": {"ready": 2}}
    assert (signal(first).arrival_rate, signal(first).queue_length, signal(first).service_s) == (None, 3, None)

    second = signal(film.slot(102.0, {ONE: stage_page(120, 4, 1.4), TWO: stage_page(60, 2, 0.6)}))
    assert (second.age_s, second.arrival_rate, second.queue_length) == (0.0, 15.0, 6)
    assert second.service_s == pytest.approx(0.5 / 30)

    third = signal(film.slot(104.0, {ONE: stage_page(140, 4, 1.8)}))
    assert (third.age_s, third.arrival_rate, third.queue_length) == (2.0, 15.0, 6), "its share stays what it was"

    fourth = signal(film.slot(106.0, {ONE: stage_page(140, 4, 1.8), TWO: stage_page(5, 0, 0.1)}))
    assert fourth.age_s == 0.0
    assert fourth.arrival_rate == pytest.approx(0 / 2 + 5 / 4), "its counters were reset, and it was silent for 4 s"


def test_the_spread_of_service_times_and_the_size_of_batches_are_those_of_the_interval() -> None:
    film = Film()
    before = [9.0, 1.0]
    film.slot(100.0, {ONE: timed_page(before, 2), TWO: stage_page(5, 0, 0.5)})
    seen = signal(film.slot(101.0, {ONE: timed_page([*before, 0.1, 0.1, 0.3, 0.3], 4), TWO: stage_page(6, 0, 9.0)}))
    assert seen.service_cv2 == pytest.approx(0.01 / 0.2**2), "of those that tell it: mean 0.2 s, variance 0.01"
    assert seen.batch_size == pytest.approx(2.0)
    idle = signal(film.slot(102.0, {ONE: timed_page([*before, 0.1, 0.1, 0.3, 0.3], 4), TWO: stage_page(6, 0, 9.0)}))
    assert (idle.service_cv2, idle.batch_size) == (None, None)


def test_what_no_page_tells_is_not_known() -> None:
    film = Film()
    film.slot(100.0, {ONE: stage_page(5, 0, 0.5)})
    seen = signal(film.slot(101.0, {ONE: stage_page(15, 0, 1.5)}))
    assert seen.service_s == pytest.approx(0.1)
    assert (seen.service_cv2, seen.batch_size) == (None, None)


@given(times_s=st.lists(st.floats(1e-4, 10.0), min_size=1, max_size=30))
def test_the_spread_is_that_of_the_times(times_s: list[float]) -> None:
    film = Film()
    film.slot(100.0, {ONE: timed_page([], 0)})
    seen = signal(film.slot(101.0, {ONE: timed_page(times_s, len(times_s))}))
    assert seen.service_cv2 == pytest.approx(np.var(times_s) / np.mean(times_s) ** 2, abs=1e-9)


def test_standbys_that_were_let_out_are_seen_by_node() -> None:
    out = [replace(replica(f"pool-{i}", "http://a:1"), node=node, let_out=True) for i, node in enumerate("abb", start=3)]
    seen = sources.observe(1.0, 1.0, [*REPLICAS, *out], [], {Endpoint(r.id, r.url): Source(1.0) for r in [*REPLICAS, *out]})
    assert seen.services["pool"].let_out == {"a": 1, "b": 2}


def test_a_replica_that_was_never_heard_makes_the_signal_old_but_not_zero() -> None:
    film = Film()
    film.slot(100.0, {ONE: stage_page(1, 1, 0.1)})
    assert signal(film.slot(107.0, {ONE: stage_page(1, 1, 0.1)})).age_s == 7.0


def test_a_service_nobody_has_heard_of_has_no_signal() -> None:
    assert Film().slot(100.0, {}).services["pool"].signal is None


def test_every_task_is_counted_in_one_observation_only() -> None:
    """t = 101: 20 tasks. t = 102: the gateway is silent. t = 103: the tasks of two seconds."""
    film = Film()
    seen = [
        film.slot(t, pages).pipelines.get("embed")
        for t, pages in (
            (99.0, {}), (100.0, {GATEWAY: gateway_page(10, 0)}), (101.0, {GATEWAY: gateway_page(30, 2)}), (102.0, {}),
            (103.0, {GATEWAY: gateway_page(40, 2)}),
        )
    ]  # fmt: skip
    assert seen == [
        None,
        PipelineObservation(0.0, 0.0, {}),
        PipelineObservation(0.0, 1.0, {"on_time": 20.0, "late": 2.0}),
        PipelineObservation(1.0, 0.0, {}),
        PipelineObservation(0.0, 2.0, {"on_time": 10.0, "late": 0.0}),
    ]


def test_the_same_sample_again_does_not_stop_the_rate() -> None:
    """Read twice, a sample's time may differ by what two clocks have drifted apart."""
    film = Film()
    for t in (100.0, 101.0, 101.001, 100.999):
        seen = film.slot(t, {ONE: stage_page(int(100 * min(t, 101.0)), 0, 1.0)})
    assert signal(seen).arrival_rate == 100.0


def test_an_address_that_goes_to_another_replica_is_another_source() -> None:
    assert Endpoint("pool-1", "http://a:1") != Endpoint("pool-3", "http://a:1")


@pytest.mark.parametrize(("url", "instance"), [("http://gateway:8080", "gateway:8080"), ("http://gateway", "gateway:80")])
def test_an_endpoint_has_the_instance_a_server_gives_it(url: str, instance: str) -> None:
    assert Endpoint("gateway-1", url).instance == instance
