"""Alert and recording rules, the server's configuration, and the names on the pages it reads, before promtool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.core import Placement, Replica
from orchestrator.costs import Cost
from orchestrator.metrics import Metrics
from services.transport import Transport
from tests import prometheus
from tests.prometheus import CONFIGURATION, RULES, promtool
from tests.services import harness

TESTS = Path(__file__).with_name("alerts_test.yml")


def test_rules_are_valid() -> None:
    promtool("check", "rules", *map(str, sorted(RULES.glob("*.yml"))))


def test_alerts_fire_when_they_must_and_only_then() -> None:
    promtool("test", "rules", str(TESTS))


def test_the_server_is_configured_as_the_orchestrator_expects() -> None:
    promtool("check", "config", "--syntax-only", str(CONFIGURATION))
    text = CONFIGURATION.read_text()
    assert "scrape_interval: 1s" in text
    assert "http://orchestrator:8090/v1/targets" in text


async def pages_of_the_data_plane(directory: Path) -> dict[str, bytes]:
    """Pages of a stage and a gateway after a task that succeeded and a request that was none."""
    replica = harness.replica(harness.Doubler())
    async with harness.stages(replica) as urls:
        routes = harness.document([harness.chain("double")], {"double": urls})
        async with harness.gateway(routes, directory) as (address, _), Transport() as transport:
            assert (await harness.infer(address, "task", 1.0)).status == 200
            assert (await harness.infer(address, "task")).status == 400
            return {
                "stage": (await transport.get(f"{urls[0]}/metrics", 5.0)).body,
                "gateway": (await transport.get(f"{address}/metrics", 5.0)).body,
            }


def page_of_the_orchestrator() -> bytes:
    """Its page with a value in every series."""
    metrics = Metrics()
    metrics.show([Replica("pool-1", "pool", "edge-1", "ready", 0.1, 1)], Placement({"pool": {"edge-1": 1}}, {}))
    metrics.tick.observe(0.01)
    metrics.telemetry({"http://127.0.0.1:8000": 0.5}, {"prometheus": 1, "scrape": 0})
    metrics.acted("apply", "ok")
    metrics.let_out("pool", "ok")
    metrics.failed({("pool", "edge-1"): 1})
    metrics.promises({"embed": (0.3, 0.05)})
    metrics.spent(Cost(replicas=1.0))
    return metrics.exposition()


async def test_names_and_help_texts_follow_the_conventions(tmp_path: Path) -> None:
    for page in (*(await pages_of_the_data_plane(tmp_path)).values(), page_of_the_orchestrator()):
        promtool("check", "metrics", stdin=page)


def names(page: bytes) -> set[str]:
    return {line.split()[2] for line in page.decode().splitlines() if line.startswith("# TYPE ")}


async def test_every_metric_is_documented_and_nothing_else_is(tmp_path: Path) -> None:
    pages = [*(await pages_of_the_data_plane(tmp_path)).values(), page_of_the_orchestrator()]
    table = (prometheus.ROOT / "docs" / "metrics.md").read_text()
    documented = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `espalier_")}
    assert set().union(*map(names, pages)) == documented


def test_without_the_tools_a_test_is_skipped_unless_they_are_required(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(prometheus, "TOOLS", tmp_path)
    monkeypatch.delenv("ESPALIER_REQUIRE_ENGINE", raising=False)
    find: Callable[[str], Path] = prometheus.tool.__wrapped__
    with pytest.raises(pytest.skip.Exception, match="install the package prometheus"):
        find("promtool")
    monkeypatch.setenv("ESPALIER_REQUIRE_ENGINE", "1")
    with pytest.raises(pytest.fail.Exception, match="there is no promtool"):
        find("promtool")
