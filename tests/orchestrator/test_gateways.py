from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from orchestrator import gateways
from orchestrator.gateways import Gateways
from orchestrator.given_gateway import GivenGateway
from orchestrator.routes import Caller
from orchestrator.telemetry.sources import Endpoint
from tests.orchestrator.test_given_gateway import LIMIT_S, listening


class Polls:
    """Who asks for the routes."""

    def __init__(self, *callers: Caller) -> None:
        self.heard = dict.fromkeys(callers, 7)

    def drop(self, caller: Caller) -> None:
        del self.heard[caller]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "POLL_S", 0.01)


@asynccontextmanager
async def looking(polls: Polls, kept: GivenGateway | None = None) -> AsyncIterator[Gateways]:
    found = Gateways(lambda: polls.heard, polls.drop, kept)
    await found.open()
    try:
        yield found
    finally:
        await found.leave()


async def until(found: Gateways, *states: str) -> None:
    async with asyncio.timeout(LIMIT_S):
        while tuple(row["state"] for row in found.status()) != states:
            await asyncio.sleep(0.01)


async def test_those_that_ask_are_looked_at_and_one_that_is_ready_stands_for_all() -> None:
    with listening() as a, listening() as b:
        b.status = 200
        callers = [Caller("a", "edge-1", a.url), Caller("b", "edge-2", b.url), Caller("without an address")]
        async with looking(Polls(*callers)) as found:
            await until(found, "starting", "ready")
            assert found.record is not None
            assert found.record.url == b.url
            assert found.endpoints() == [Endpoint("a", a.url), Endpoint("b", b.url)]
            assert found.status()[1] == {"name": "b", "node": "edge-2", "url": b.url, "state": "ready", "version": 7}


async def test_nobody_that_asks_is_no_gateway() -> None:
    async with looking(Polls()) as found:
        assert (found.record, found.endpoints(), found.status()) == (None, [], [])


async def test_one_that_is_gone_is_forgotten() -> None:
    with listening() as there:
        there.status = 200
        with listening() as gone:
            gone.status = 200
            # Of one name: a gateway that was started again elsewhere.
            polls = Polls(Caller("g", "edge-1", there.url), Caller("g", "edge-2", gone.url))
        async with looking(polls) as found:
            await until(found, "ready")
            assert found.endpoints() == [Endpoint("g", there.url)]


async def test_the_kept_one_is_not_counted_twice() -> None:
    with listening() as kept, listening() as other:
        kept.status = other.status = 200
        polls = Polls(Caller("gateway-1", "edge-1", kept.url), Caller("gateway-2", "edge-2", other.url))
        async with looking(polls, GivenGateway(kept.url)) as found:
            await until(found, "ready", "ready")
            assert found.record is not None
            assert found.record.url == kept.url
            assert found.endpoints() == [Endpoint("gateway-1", kept.url), Endpoint("gateway-2", other.url)]
