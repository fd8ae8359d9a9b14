"""Several gateways over one testbed: each its own ingress, on its own node, and none of them needed by the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.dataplane import routes
from tests.system.edge import MARK, PIPELINE, Edge, Served, until


@dataclass(kw_only=True)
class Further(Served):
    """A gateway that somebody started on a node of the testbed; the orchestrator learns of it by its polls alone."""

    url: str
    mark: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def further(edge: Edge, directory: Path, name: str, node: str) -> Iterator[Further]:
    daemon = edge.state.read_daemon()
    assert daemon is not None
    argv = [sys.executable, "-m", "services.gateway", "--port", "0", "--routes-url", f"{daemon.url}/v1/routes"]
    environment = {**os.environ, MARK: edge.mark, "ESPALIER_NAME": name, "ESPALIER_NODE": node}
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: states(edge).get(name) == "ready", f"{name} is ready")
        (row,) = [row for row in edge.status()["gateways"] if row["name"] == name]
        assert row["node"] == node
        yield Further(url=row["url"], mark=edge.mark, process=process)
    finally:
        process.kill()
        process.wait()


def states(edge: Edge) -> dict[str, str]:
    return {row["name"]: row["state"] for row in edge.status()["gateways"]}


def seen_by_the_orchestrator(edge: Edge) -> Counter[str]:
    """Outcomes of the pipeline, over the whole decision log."""
    found: Counter[str] = Counter()
    for line in edge.state.decisions.read_text().splitlines():
        pipelines = json.loads(line).get("observation", {}).get("pipelines", {})
        found.update({k: int(v) for k, v in pipelines.get(PIPELINE, {}).get("outcomes", {}).items()})
    return +found


def test_tasks_come_in_at_every_gateway_and_their_outcomes_are_summed(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    with further(edge, tmp_path, "gateway-2", "edge-2") as second:
        until(lambda: states(edge) == {"gateway-1": "ready", "gateway-2": "ready"}, "both are ready")
        # What is counted at a gateway is told from one look to the next, and the first look at this one is still to come.
        looks = edge.status()["slots"]["done"]
        until(lambda: edge.status()["slots"]["done"] > looks + 1, "both have been looked at")
        before = seen_by_the_orchestrator(edge)
        with edge.load(tmp_path, 10, 3) as here, second.load(tmp_path, 20, 3) as there:
            # A drain waits for both gateways, so neither sends to the replica any more when it is stopped.
            here.wait_for(5)
            edge.espalier("scale", "pool", "1", "--wait")
            ran = here.finish(), there.finish()
        assert [each.outcomes for each in ran] == [{"on_time": 30}, {"on_time": 60}]
        until(lambda: sum((seen_by_the_orchestrator(edge) - before).values()) == 90, "every task is counted once")
        daemon = edge.state.read_daemon()
        assert daemon is not None
        targets = httpx.get(f"{daemon.url}/v1/targets", trust_env=False).json()
        assert {t["labels"]["replica"] for t in targets if t["labels"]["job"] == "gateway"} == {"gateway-1", "gateway-2"}


def test_a_gateway_that_is_gone_blocks_nobody(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    with further(edge, tmp_path, "gateway-3", "edge-2") as second, edge.load(tmp_path, 20, 5) as load:
        load.wait_for(10)
        os.kill(second.process.pid, signal.SIGKILL)
        edge.espalier("scale", "pool", "1", "--wait")
        until(lambda: states(edge) == {"gateway-1": "ready"}, "it is forgotten")
        ran = load.finish()
    assert ran.outcomes == {"on_time": load.tasks}
    kept = routes.load(edge.state.gateway_routes)
    assert kept is not None
    assert len(kept.services["pool"].replicas) == 1
