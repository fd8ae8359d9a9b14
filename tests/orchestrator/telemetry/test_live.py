from __future__ import annotations

import json
import logging
import time

import pytest

from orchestrator.core import Signal
from orchestrator.telemetry.live import Live
from orchestrator.telemetry.sources import Endpoint
from tests.orchestrator.telemetry.pages import Clock, Page, gateway_page, replica, stage_page


def known(page: Page, name: str, queue: int, age_s: float) -> str:
    """The answer of a server that knows the queue length of one replica."""
    where = {"instance": page.url.removeprefix("http://"), "replica": name, "job": "stage"}
    metric = {"__name__": "espalier_stage_queue_length", "stage": "pool", "node": "a", **where}
    series = {"metric": metric, "values": [[time.time() - age_s, str(queue)]]}
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": [series]}})


async def queue(live: Live, page: Page, name: str = "pool-1") -> Signal:
    found = (await live.observe(time.monotonic(), [replica(name, page.url)])).services["pool"].signal
    assert found is not None
    return found


async def test_without_a_server_every_source_is_scraped(pages: list[Page]) -> None:
    clock, gateway = Clock(), pages[2]
    live = Live(lambda: [Endpoint("gateway-1", gateway.url)], clock=clock)
    pages[0].text, pages[1].text, gateway.text = stage_page(10, 1, 0.25), None, gateway_page(5, 0)
    replicas = [replica("pool-1", pages[0].url), replica("pool-2", pages[1].url), replica("pool-3", "", "starting")]
    await live.observe(100.0, replicas)
    clock.t = 102.0
    pages[0].text, gateway.text = stage_page(30, 2, 0.75), gateway_page(9, 1)
    seen = await live.observe(102.0, replicas)
    assert seen.services["pool"].replicas == {"a": {"ready": 2, "starting": 1}}
    assert seen.services["pool"].signal == Signal(2.0, 10.0, 2.0, 0.0, None, 0.025), "pool-2 was never heard"
    assert seen.pipelines["embed"].outcomes == {"on_time": 4.0, "late": 1.0}
    assert live.used == {"prometheus": 0, "scrape": 3}
    clock.t = 103.0
    assert live.ages_s() == {pages[0].url: 1.0, pages[1].url: 3.0, gateway.url: 1.0}
    await live.close()


async def test_what_the_server_knows_is_not_scraped(pages: list[Page]) -> None:
    server, page = pages[:2]
    server.text, page.text = known(page, "pool-1", queue=7, age_s=0.5), stage_page(0, 1, 0.0)
    live = Live(lambda: [], server.url)
    signal = await queue(live, page)
    assert signal.queue_length == 7
    assert 0.5 <= signal.age_s < 2.5
    assert page.asked == []
    assert live.used == {"prometheus": 1, "scrape": 0}
    await live.close()


@pytest.mark.parametrize(
    ("name", "age_s", "stale_after_s", "why"),
    [
        ("pool-2", 0.5, 5.0, "the server knows another replica at this address"),
        ("pool-1", 2.6, 5.0, "the sample is too old"),
        ("pool-1", 1.5, 2.0, "the sample is too old for a testbed that calls 2 s stale"),
    ],
)
async def test_what_the_server_does_not_know_is_scraped_in_the_same_slot(
    pages: list[Page], name: str, age_s: float, stale_after_s: float, why: str
) -> None:
    server, page = pages[:2]
    server.text, page.text = known(page, "pool-1", queue=7, age_s=age_s), stage_page(0, 1, 0.0)
    live = Live(lambda: [], server.url, lambda: stale_after_s)
    assert (await queue(live, page, name)).queue_length == 1, why
    assert live.used == {"prometheus": 0, "scrape": 1}
    await live.close()


async def test_a_server_that_is_lost_costs_one_wait_and_two_lines(pages: list[Page], caplog: pytest.LogCaptureFixture) -> None:
    """It hangs, so the first slot waits for it, and scrapes; the next ones ask it beside. Then it answers again."""
    caplog.set_level(logging.INFO, "orchestrator.telemetry")
    server, page = pages[:2]
    server.go_on.clear()
    page.text = stage_page(0, 1, 0.0)
    clock = Clock()
    live = Live(lambda: [], server.url, clock=clock)
    for _ in range(3):
        assert (await queue(live, page)).queue_length == 1
        assert live.used == {"prometheus": 0, "scrape": 1}
    assert (len(server.asked), len(page.asked)) == (3, 3)
    server.text = known(page, "pool-1", queue=7, age_s=0.0)
    server.go_on.set()
    assert (await queue(live, page)).queue_length == 1, "it had been scraped before the server's answer was there"
    clock.t += 1.0
    assert (await queue(live, page)).queue_length == 7
    assert live.used == {"prometheus": 1, "scrape": 0}
    lost, back = caplog.messages
    assert "is lost (no answer within 0.4 s)" in lost
    assert "is back" in back
    await live.close()
