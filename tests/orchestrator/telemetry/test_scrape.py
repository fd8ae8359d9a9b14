from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.core import Replica
from orchestrator.telemetry.scrape import Scrape
from services.dataplane.routes import ReplicaState


class Page(ThreadingHTTPServer):
    """An exposition endpoint whose page a test writes; None answers 500."""

    daemon_threads = True
    text: str | None = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Page

    def do_GET(self) -> None:
        body = (self.server.text or "").encode()
        self.send_response(200 if self.server.text is not None else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def pages() -> Iterator[list[Page]]:
    found = [Page(("127.0.0.1", 0), Handler) for _ in range(3)]
    for page in found:
        threading.Thread(target=page.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    for page in found:
        page.shutdown()
        page.server_close()


class Clock:
    t = 100.0

    def __call__(self) -> float:
        return self.t


def stage_page(requests: int, queue: int, compute_s: float) -> str:
    labels = 'stage="pool",node="a"'
    return (
        f'espalier_stage_requests_total{{{labels},outcome="ok"}} {requests}\n'
        f"espalier_stage_queue_length{{{labels}}} {queue}\n"
        f"espalier_stage_compute_duration_seconds_sum{{{labels}}} {compute_s}\n"
        f"espalier_stage_compute_duration_seconds_count{{{labels}}} {requests}\n"
    )


def replica(id: str, url: str, state: ReplicaState = "ready") -> Replica:
    return Replica(id, "pool", "a", state, 0.1, 1, url=url)


async def test_rates_are_the_growth_of_counters_and_a_silent_replica_ages(pages: list[Page]) -> None:
    """t = 100: first look. t = 102: one served 20, the other 10. t = 104: the second one is silent. t = 106: it is back."""
    clock = Clock()
    one, two = pages[:2]
    replicas = [replica("pool-1", one.url), replica("pool-2", two.url)]
    scrape = Scrape(lambda: [], clock)
    one.text, two.text = stage_page(100, 1, 1.0), stage_page(50, 2, 0.5)
    first = (await scrape.observe(clock.t, replicas)).services["pool"]
    assert first.replicas == {"a": {"ready": 2}}
    assert first.signal is not None
    assert (first.signal.arrival_rate, first.signal.queue_length, first.signal.service_s) == (None, 3, None)

    clock.t = 102.0
    one.text, two.text = stage_page(120, 4, 1.4), stage_page(60, 2, 0.6)
    second = (await scrape.observe(clock.t, replicas)).services["pool"].signal
    assert second is not None
    assert (second.age_s, second.arrival_rate, second.queue_length) == (0.0, 15.0, 6)
    assert second.service_s == pytest.approx(0.5 / 30)

    clock.t = 104.0
    one.text, two.text = stage_page(140, 4, 1.8), None
    third = (await scrape.observe(clock.t, replicas)).services["pool"].signal
    assert third is not None
    assert (third.age_s, third.arrival_rate, third.queue_length) == (2.0, 15.0, 6), "its share stays what it was"
    assert scrape.ages_s() == {one.url: 0.0, two.url: 2.0}

    clock.t = 106.0
    two.text = stage_page(5, 0, 0.1)
    fourth = (await scrape.observe(clock.t, replicas)).services["pool"].signal
    assert fourth is not None
    assert fourth.age_s == 0.0
    assert fourth.arrival_rate == pytest.approx(0 / 2 + 5 / 4), "its counters were reset, and it was silent for 4 s"
    await scrape.close()


async def test_a_replica_that_was_never_heard_makes_the_signal_old_but_not_zero(pages: list[Page]) -> None:
    clock = Clock()
    pages[0].text, pages[1].text = stage_page(1, 1, 0.1), None
    replicas = [replica("pool-1", pages[0].url), replica("pool-2", pages[1].url)]
    scrape = Scrape(lambda: [], clock)
    await scrape.observe(clock.t, replicas)
    clock.t = 107.0
    signal = (await scrape.observe(clock.t, replicas)).services["pool"].signal
    assert signal is not None
    assert signal.age_s == 7.0
    await scrape.close()


async def test_a_service_nobody_has_heard_of_has_no_signal(pages: list[Page]) -> None:
    pages[0].text = None
    scrape = Scrape(lambda: [])
    seen = await scrape.observe(0.0, [replica("pool-1", pages[0].url), replica("pool-2", "http://127.0.0.1:9", "starting")])
    assert seen.services["pool"].signal is None
    assert seen.services["pool"].replicas == {"a": {"ready": 1, "starting": 1}}
    await scrape.close()


async def test_outcomes_come_from_the_gateways(pages: list[Page]) -> None:
    clock, gateway = Clock(), pages[2]
    scrape = Scrape(lambda: [gateway.url], clock)
    for t, on_time, late in ((100.0, 10, 0), (101.0, 30, 2)):
        clock.t = t
        gateway.text = (
            f'espalier_requests_total{{pipeline="embed",outcome="on_time"}} {on_time}\n'
            f'espalier_requests_total{{pipeline="embed",outcome="late"}} {late}\n'
        )
        seen = await scrape.observe(t, [])
    embed = seen.pipelines["embed"]
    assert (embed.interval_s, embed.age_s, embed.outcomes) == (1.0, 0.0, {"on_time": 20.0, "late": 2.0})
    await scrape.close()


async def test_a_page_that_is_no_exposition_counts_as_silence(pages: list[Page]) -> None:
    pages[0].text = "espalier_stage_queue_length nonsense\n"
    scrape = Scrape(lambda: [])
    assert (await scrape.observe(0.0, [replica("pool-1", pages[0].url)])).services["pool"].signal is None
    await scrape.close()
