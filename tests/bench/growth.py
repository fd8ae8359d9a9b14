"""What grows with nodes, replicas and links beside the decision itself: `python -m tests.bench.growth`, processor time.

For testbeds of 8 to 1,000 nodes, 20 services and 4 replicas a node: the routes document (its size, writing it, reading and
compiling it at a gateway), a replica's page, a Prometheus server's answer for all of them, and making the observation; a core
placement by the heuristic of the live system, of 6 services. Nothing goes over a wire: these are lower bounds, on one core.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from orchestrator.core import Replica
from orchestrator.placement import heuristics
from orchestrator.telemetry import exposition, prometheus, sources
from orchestrator.telemetry.sources import Endpoint, Source
from services.dataplane.routes import Link, Routes, Service
from services.gateway.table import Table
from services.stage.metrics import StageMetrics
from tests.bench.placement import PARAMETERS, drawn
from tests.services.harness import chain, document

SIZES = (8, 64, 250, 500, 1000)
SERVICES, PER_NODE, LINKS_PER_NODE = 20, 4, 8
ROUNDS = 3


def measure(nodes: int) -> dict[str, Any]:
    """Everything, for one number of nodes: times in seconds of this processor, sizes in bytes."""
    replicas = _replicas(nodes)
    routes = _routes(nodes, replicas)
    text = routes.model_dump_json()
    sample, answer = _sample(), _answer(replicas)
    problem = drawn(1, nodes, 6, 4, parameters=PARAMETERS)
    known = {Endpoint(r.id, r.url): Source(0.0) for r in replicas}
    for source in known.values():
        source.take(exposition.parse(sample, 0.0))
        source.take(exposition.parse(sample, 1.0))
    return {
        "nodes": nodes,
        "replicas": len(replicas),
        "routes_bytes": len(text),
        "routes_write_s": _time(routes.model_dump_json),
        "routes_read_s": _time(lambda: Routes.model_validate_json(text)),
        "routes_compile_s": _time(lambda: Table(routes)),
        "page_bytes": len(sample),
        "page_read_s": _time(lambda: exposition.parse(sample, 0.0)),
        "prometheus_bytes": len(answer),
        "prometheus_read_s": _time(lambda: prometheus.read(answer, 5.0, 5.0)),
        "place_s": _time(lambda: heuristics.near(problem)),
        "observe_s": _time(lambda: sources.observe(1.0, 1.0, replicas, [], known)),
    }


def _replicas(nodes: int) -> list[Replica]:
    count = nodes * PER_NODE
    return [
        Replica(
            f"service-{i % SERVICES}-{i}", f"service-{i % SERVICES}", f"node-{i % nodes}", "ready", 0.1, 1 << 27,
            url=f"http://10.0.{i // 250}.{i % 250}:8000",
        )
        for i in range(count)
    ]  # fmt: skip


def _routes(nodes: int, replicas: list[Replica]) -> Routes:
    names = [f"service-{i}" for i in range(SERVICES)]
    pipelines = [chain(*names[i : i + 4], name=f"pipeline-{i}") for i in range(0, SERVICES, 4)]
    made = document(pipelines, {name: [] for name in names})
    services = {name: _with(made.services[name], [r for r in replicas if r.service == name]) for name in names}
    link = Link(latency_s=0.001, bandwidth_bytes_per_s=1e9)
    links = {
        f"node-{a}": {f"node-{(a + step) % nodes}": link for step in range(1, min(LINKS_PER_NODE, nodes - 1) + 1)}
        for a in range(nodes)
    }
    return made.model_copy(update={"services": services, "links": links})


def _with(service: Service, replicas: list[Replica]) -> Service:
    routed = [{"id": r.id, "node": r.node, "url": r.url, "state": r.state} for r in replicas]
    return Service.model_validate({**service.model_dump(), "replicas": routed})


def _sample() -> str:
    return StageMetrics("service-0", "node-0").exposition().decode()


def _answer(replicas: list[Replica]) -> bytes:
    """What the server says of all replicas: two samples of each series that is looked at, five seconds apart at most."""
    names = [f"{exposition.PREFIX}{name}" for name in sorted(exposition.GAUGES | exposition.COUNTERS)]
    result = [
        {
            "metric": {
                "__name__": name, "instance": r.url.removeprefix("http://"), "job": "stage", "replica": r.id,
                "stage": r.service, "node": r.node,
            },
            "values": [[t, "1234.5"] for t in (1.0, 2.0, 3.0, 4.0, 5.0)],
        }
        for r in replicas
        for name in names
    ]  # fmt: skip
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()


def _time(work: Callable[[], object]) -> float:
    found = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


if __name__ == "__main__":
    for size in [int(word) for word in sys.argv[1:]] or SIZES:
        print(json.dumps({key: round(value, 6) for key, value in measure(size).items()}), flush=True)
