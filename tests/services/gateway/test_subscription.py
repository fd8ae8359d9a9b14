"""Routes arrive by long poll, are kept on disk, and outlive the orchestrator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Response

from services.dataplane import routes
from services.dataplane.routes import Routes
from services.gateway import app as gateway_app
from services.gateway.app import Gateway
from tests.services import harness
from tests.services.harness import Doubler, chain, document, infer, outcomes, replica, result


class Orchestrator:
    """The routes' side of a real one: answers at once when the version differs, else waits for the next."""

    def __init__(self, first: Routes) -> None:
        self.current = first
        self.acknowledged: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self._changed = asyncio.Event()

    def publish(self, fresh: Routes) -> None:
        self.current = fresh
        self._changed.set()
        self._changed = asyncio.Event()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/routes")
        async def read(after: int, wait: float, gateway: str) -> Response:
            self.acknowledged.put_nowait((gateway, after))
            if self.current.version == after:
                try:
                    await asyncio.wait_for(self._changed.wait(), min(wait, 5.0))
                except TimeoutError:
                    return Response(status_code=304)
            return Response(self.current.model_dump_json(), media_type="application/json")

        return app


@asynccontextmanager
async def following(url: str | None, file: Path) -> AsyncIterator[tuple[str, Gateway]]:
    gateway = Gateway(name="g", node="local", routes_urls=[f"{url}/v1/routes"] if url else (), routes_file=file)
    async with harness.serving(gateway_app.build(gateway)) as address:
        yield address, gateway


async def acknowledged(orchestrator: Orchestrator, version: int) -> None:
    """Wait until the gateway's poll says that it has applied the version."""
    async with asyncio.timeout(10):
        while await orchestrator.acknowledged.get() != ("g", version):
            pass


async def test_a_new_version_is_applied_kept_and_acknowledged(tmp_path: Path) -> None:
    file = tmp_path / "routes.json"
    async with harness.stages(replica(Doubler())) as [stage]:
        orchestrator = Orchestrator(document([chain("double")], {"double": []}, version=3))
        async with harness.serving(orchestrator.app()) as url, following(url, file) as (address, gateway):
            await acknowledged(orchestrator, 3)
            assert not gateway.ready
            assert (await infer(address, "task", 1.0)).status == 503
            orchestrator.publish(document([chain("double")], {"double": [stage]}, version=4))
            await acknowledged(orchestrator, 4)
            assert gateway.ready
            assert result(await infer(address, "task", 1.0)) == [2.0]
            kept = routes.load(file)
            assert kept is not None
            assert kept.version == 4


async def test_the_data_plane_outlives_the_control_plane(tmp_path: Path) -> None:
    file = tmp_path / "routes.json"
    async with harness.stages(replica(Doubler())) as [stage]:
        orchestrator = Orchestrator(document([chain("double")], {"double": [stage]}, version=7))
        async with harness.serving(orchestrator.app()) as url, following(url, file):
            await acknowledged(orchestrator, 7)
        # A gateway that starts while no orchestrator answers serves what the last one left on disk.
        async with following(url, file) as (address, gateway):
            assert gateway.subscription.table.routes.version == 7
            assert result(await infer(address, "task", 1.0)) == [2.0]
            assert outcomes(gateway.metrics.exposition().decode()) == {"on_time": 1}


async def test_nonsense_from_the_orchestrator_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "routes.json"
    asked = asyncio.Semaphore(0)
    app = FastAPI()

    @app.get("/v1/routes")
    async def read() -> Response:
        asked.release()
        return Response(b'{"version": "new"}')

    async with harness.stages(replica(Doubler())) as [stage]:
        routes.save(document([chain("double")], {"double": [stage]}), file)
        async with harness.serving(app) as url, following(url, file) as (address, _):
            for _ in range(2):
                await asyncio.wait_for(asked.acquire(), 10)
            assert result(await infer(address, "task", 1.0)) == [2.0]


async def test_a_gateway_that_knows_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "routes.json").write_text("{broken")
    async with following(None, tmp_path / "routes.json") as (address, gateway):
        assert not gateway.ready
        answer = await infer(address, "task", 1.0)
        assert answer.status == 404
        assert b"none yet" in answer.body


async def test_of_several_control_planes_the_next_is_asked_when_one_fails(tmp_path: Path) -> None:
    first = Orchestrator(document([chain("double")], {"double": []}, version=3))
    second = Orchestrator(document([chain("double")], {"double": []}, version=9))
    async with harness.serving(second.app()) as that:
        async with harness.serving(first.app()) as this:
            urls = [f"{url}/v1/routes" for url in (this, that)]
            gateway = Gateway(name="g", node="edge-1", port=1, routes_urls=urls, routes_file=None)
            async with harness.serving(gateway_app.build(gateway)):
                await acknowledged(first, 3)
                assert gateway.subscription.url == urls[0]
                first.publish(document([chain("double")], {"double": []}, version=4))
                await acknowledged(first, 4)
        gateway = Gateway(name="g", node="edge-1", port=1, routes_urls=urls, routes_file=None)
        async with harness.serving(gateway_app.build(gateway)):
            await acknowledged(second, 9)
            assert gateway.subscription.url == urls[1]
