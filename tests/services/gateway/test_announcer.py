"""Standbys that a gateway lets out, and what the orchestrator says to that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response

from services.dataplane.routes import Routes
from services.gateway import announcer
from services.gateway.app import Gateway
from tests.services import harness
from tests.services.gateway.test_subscription import Orchestrator, acknowledged, following
from tests.services.harness import Doubler, chain, document, infer, replica, result, with_standbys
from tests.services.test_deadlines import closed_port


class Answering(Orchestrator):
    """One that answers to let-outs with these statuses, one after the other, and then with the last of them."""

    def __init__(self, first: Routes, *statuses: int) -> None:
        super().__init__(first)
        self.statuses = list(statuses)
        self.told: list[dict[str, str]] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    def app(self) -> FastAPI:
        app = super().app()

        @app.post("/v1/let-out")
        async def let_out(request: Request) -> Response:
            self.told.append(await request.json())
            await self.go_on.wait()
            return Response(status_code=self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0])

        return app


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def routed(gateway: Gateway) -> tuple[str, ...]:
    return gateway.subscription.table.targets["double"].replicas


def let_out(gateway: Gateway) -> float:
    lines = gateway.metrics.exposition().decode().splitlines()
    (line,) = [line for line in lines if line.startswith('espalier_gateway_let_out_total{stage="double"}')]
    return float(line.split()[1])


def routes(alive: str, version: int = 1, *standbys: str, allowance: int = 1) -> Routes:
    """One replica that nobody can reach, and one that answers."""
    kept = document([chain("double")], {"double": [closed_port(), alive]}, version)
    return with_standbys(kept, *standbys, allowance=allowance)


async def due(url: str) -> None:
    """Two tasks: the first finds nobody alive, the second is sent to the standby that is let out for it."""
    first, second = await infer(url, "task", 1.0), await infer(url, "task", 2.0)
    assert {first.status, second.status} <= {200, 502}
    assert result(second) == [4.0]


async def test_the_orchestrator_is_told_once(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler(), identifier="double-1")) as [alive]:
        orchestrator = Answering(routes(alive, 1, "double-1"), 200)
        async with harness.serving(orchestrator.app()) as where, following(where, tmp_path / "r") as (url, gateway):
            await acknowledged(orchestrator, 1)
            assert let_out(gateway) == 0
            await due(url)
            await until(lambda: orchestrator.told == [{"service": "double", "replica": "double-1"}])
            assert routed(gateway) == ("double-0", "double-1")
            assert let_out(gateway) == 1
            orchestrator.publish(routes(alive, 2))
            await acknowledged(orchestrator, 2)
            assert routed(gateway) == ("double-0", "double-1")
            assert len(orchestrator.told) == 1


async def test_one_that_is_refused_is_a_standby_again(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler(), identifier="double-1")) as [alive]:
        orchestrator = Answering(routes(alive, 1, "double-1"), 409)
        async with harness.serving(orchestrator.app()) as where, following(where, tmp_path / "r") as (url, gateway):
            await acknowledged(orchestrator, 1)
            await due(url)
            await until(lambda: routed(gateway) == ("double-0",))
            await infer(url, "task", 1.0)
            assert len(orchestrator.told) == 1, "nobody is let out before the next document"


async def test_an_orchestrator_that_cannot_be_told_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcer, "FIRST_PAUSE_S", 0.01)
    async with harness.stages(replica(Doubler(), identifier="double-1")) as [alive]:
        orchestrator = Answering(routes(alive, 1, "double-1"), 503, 503, 200)
        async with harness.serving(orchestrator.app()) as where, following(where, tmp_path / "r") as (url, gateway):
            await acknowledged(orchestrator, 1)
            await due(url)
            await until(lambda: len(orchestrator.told) == 3)
            assert routed(gateway) == ("double-0", "double-1")


async def test_without_an_orchestrator_the_standby_is_used_all_the_same(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler(), identifier="double-1")) as [alive]:
        async with harness.gateway(routes(alive, 1, "double-1"), tmp_path) as (url, gateway):
            await due(url)
            assert routed(gateway) == ("double-0", "double-1")


async def test_new_routes_made_before_it_was_told_do_not_take_it_back(tmp_path: Path) -> None:
    async with harness.stages(replica(Doubler(), identifier="double-1")) as [alive]:
        orchestrator = Answering(routes(alive, 1, "double-1"), 200)
        orchestrator.go_on.clear()
        async with harness.serving(orchestrator.app()) as where, following(where, tmp_path / "r") as (url, gateway):
            await acknowledged(orchestrator, 1)
            await due(url)
            await until(lambda: len(orchestrator.told) == 1)
            orchestrator.publish(routes(alive, 2, "double-1"))
            await acknowledged(orchestrator, 2)
            assert routed(gateway) == ("double-0", "double-1"), "still let out"
            orchestrator.publish(routes(alive, 3, "double-1", allowance=0))
            await acknowledged(orchestrator, 3)
            assert routed(gateway) == ("double-0",), "the orchestrator wants none let out"
            orchestrator.go_on.set()
