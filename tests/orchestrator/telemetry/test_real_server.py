"""The telemetry before a real Prometheus server, with the configuration of the deployment."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from orchestrator import app
from orchestrator.core import Observation, Signal
from orchestrator.metrics import Metrics
from orchestrator.telemetry import sources, targets
from orchestrator.telemetry.exposition import Sample
from orchestrator.telemetry.live import Live
from orchestrator.telemetry.prometheus import Prometheus
from orchestrator.telemetry.scrape import Scrape
from orchestrator.telemetry.sources import Endpoint
from tests import prometheus
from tests.orchestrator.telemetry.pages import Page, gateway_page, replica, stage_page
from tests.prometheus import Server
from tests.services import harness

DASHBOARDS = prometheus.ROOT / "deploy" / "grafana" / "provisioning" / "dashboards"
SEEN_LIMIT_S = 30.0
"""The server needs 5 s to begin with its targets."""
POLL_S = 0.02


class Told:
    """Of a control plane, what a Prometheus server asks for."""

    def __init__(self, stages: Sequence[Endpoint], gateways: Sequence[Endpoint]) -> None:
        self._targets = targets.document(stages, gateways)

    def targets(self) -> list[dict[str, Any]]:
        return self._targets

    def exposition(self) -> bytes:
        return Metrics().exposition()


class Scene:
    """Two replicas and a gateway that the server is told of, and a third replica that it is not."""

    def __init__(self, pages: Sequence[Page], undiscovered: Page) -> None:
        self.pages = [*pages, undiscovered]
        self.replicas = [replica(f"pool-{i}", page.url) for i, page in enumerate((*pages[:2], undiscovered), start=1)]
        self.gateways = [Endpoint("gateway-1", pages[2].url)]
        self.told = [*sources.sampled(self.replicas[:2]), *self.gateways]
        self.write(1)

    def write(self, n: int) -> None:
        """The pages after another n-th of the load."""
        self.pages[0].text, self.pages[1].text = stage_page(100 * n, 1 + n, 1.0 * n), stage_page(10 * n, 2, 0.2 * n)
        self.pages[2].text, self.pages[3].text = gateway_page(50 * n, 3 * n), stage_page(7 * n, n, 0.1 * n)


@pytest.fixture
def scene(pages: list[Page], undiscovered: Page) -> Scene:
    return Scene(pages, undiscovered)


@pytest.fixture
async def server(scene: Scene, tmp_path: Path) -> AsyncIterator[Server]:
    async with harness.serving(app.build(cast(app.Controls, Told(scene.told[:2], scene.gateways)))) as url:
        found = Server(tmp_path, url)
        found.start()
        try:
            await found.ready()
            yield found
        finally:
            found.kill()


async def until_seen(server: Server, scene: Scene) -> None:
    """Wait until the newest samples of the server are the pages as they are now."""
    scrape, asked = Scrape(), Prometheus(server.url)
    pages = {endpoint: await scrape.read(endpoint.url) for endpoint in scene.told}
    await scrape.close()

    def newest(samples: tuple[Sample, ...]) -> object:
        return samples[-1].values if samples else None

    async with asyncio.timeout(SEEN_LIMIT_S):
        while True:
            found = await asked.newest()
            if all(
                page is not None and newest(found.get((endpoint.instance, endpoint.name), ())) == page.values
                for endpoint, page in pages.items()
            ):
                break
            await asyncio.sleep(POLL_S)
    await asked.close()


async def observe(live: Live, scene: Scene, replicas: int = 2) -> Observation:
    # Slots that are closer than this see no news, by design.
    await asyncio.sleep(sources.MIN_INTERVAL_S)
    return await live.observe(time.monotonic(), scene.replicas[:replicas])


def signal(seen: Observation) -> Signal:
    found = seen.services["pool"].signal
    assert found is not None
    return found


def executes(server: Server, client: httpx.Client, expression: str) -> str:
    """Why an expression does not execute, or nothing."""
    answer = client.get(f"{server.url}/api/v1/query", params={"query": expression.replace("$pipeline", ".*")})
    return "" if answer.json()["status"] == "success" else f"{expression}: {answer.json()['error']}"


def dashboard_expressions() -> list[str]:
    dashboard = json.loads((DASHBOARDS / "espalier.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(found) > 10
    return found


async def test_a_server_is_used_while_it_is_there_and_missed_when_it_is_not(
    scene: Scene, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Told of nobody yet; then all are seen through it, as directly; a new replica; killed; back."""
    caplog.set_level(logging.INFO, "orchestrator.telemetry")
    live, direct = Live(lambda: scene.gateways, server.url), Live(lambda: scene.gateways)

    assert signal(await observe(live, scene)).queue_length == 4, "it has not begun to scrape"
    assert live.used == {"prometheus": 0, "scrape": 3}
    with httpx.Client(trust_env=False) as client:
        assert [problem for each in dashboard_expressions() if (problem := executes(server, client, each))] == []

    await until_seen(server, scene)
    await observe(live, scene)
    await observe(direct, scene)
    assert live.used == {"prometheus": 3, "scrape": 0}

    scene.write(2)
    await until_seen(server, scene)
    through, directly = await observe(live, scene), await observe(direct, scene)
    assert live.used == {"prometheus": 3, "scrape": 0}
    assert through.pipelines["embed"].outcomes == directly.pipelines["embed"].outcomes == {"on_time": 50.0, "late": 3.0}
    assert through.services["pool"].replicas == directly.services["pool"].replicas
    for field in ("queue_length", "inflight", "wait_s", "service_s"):
        assert getattr(signal(through), field) == getattr(signal(directly), field)
    rate = signal(through).arrival_rate
    assert rate is not None
    assert 110 / rate == pytest.approx(round(110 / rate), abs=0.05), "the growth over a whole number of scrapes"
    assert signal(through).age_s < 2.5

    seen = await observe(live, scene, replicas=3)
    assert live.used == {"prometheus": 3, "scrape": 1}
    assert signal(seen).queue_length == 7, "the one that the server has not discovered is in it"

    server.kill()
    scene.write(3)
    for _ in range(2):
        assert signal(await observe(live, scene, replicas=3)).queue_length == 9
        assert live.used == {"prometheus": 0, "scrape": 4}

    server.start()
    await server.ready()
    await until_seen(server, scene)
    await observe(live, scene)
    await observe(live, scene)
    assert live.used == {"prometheus": 3, "scrape": 0}
    lost, back = caplog.messages
    assert "is lost" in lost
    assert "is back" in back
    await live.close()
    await direct.close()


def test_the_dashboard_reads_the_provisioned_datasource() -> None:
    dashboard = json.loads((DASHBOARDS / "espalier.json").read_text())
    datasource = (DASHBOARDS.parent / "datasources" / "prometheus.yml").read_text()
    uids = {part["datasource"]["uid"] for panel in dashboard["panels"] for part in (panel, *panel["targets"])}
    (uid,) = uids
    assert f"uid: {uid}\n" in datasource
