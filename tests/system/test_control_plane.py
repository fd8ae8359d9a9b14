"""The data plane outlives its orchestrator, and the gateway comes back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.system.edge import Edge, until


def test_a_killed_orchestrator_costs_no_task_and_its_successor_disturbs_nothing(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    before, pids, daemon = edge.status(), edge.pids(), edge.state.read_daemon()
    assert daemon is not None
    with edge.load(tmp_path, 30, 5) as load:
        load.wait_for(20)
        os.kill(daemon.pid, signal.SIGKILL)
        time.sleep(1)
        edge.up()
        adopted, after = edge.pids(), edge.status()
        edge.espalier("scale", "pool", "1", "--wait")
        scaled = edge.status()["version"]
        ran = load.finish()
        counted = load.counted()
    successor = edge.state.read_daemon()
    assert successor is not None
    assert successor.pid != daemon.pid
    assert adopted == pids, "the same processes"
    assert after["gateway"] == before["gateway"]
    assert after["version"] >= before["version"]
    assert scaled > after["version"], "the routes' version goes on growing"
    assert edge.gauge("espalier_gateway_routes_version") == edge.status()["version"], "and the gateway listens to the successor"
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered == []
    assert counted == ran.outcomes, "gateway and generator agree"


def test_a_killed_gateway_is_back_within_seconds_at_its_address(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    url, pids = edge.url, edge.pids()

    def is_back() -> bool:
        gateway = edge.status()["gateway"]
        return bool(gateway["pid"] != pids["gateway"] and gateway["state"] == "ready")

    with edge.load(tmp_path, 20, 5) as load:
        load.wait_for(20)
        os.kill(pids["gateway"], signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(pids["gateway"], signal.SIGKILL)
        until(is_back, "the gateway is back", 10)
        ran = load.finish()
    ran.check_every_task_ended_once(load.tasks)
    assert ran.unanswered, "it died with tasks in its hands"
    assert {task["outcome"] for task in ran.unanswered} == {"failed"}
    assert {task["reason"] for task in ran.unanswered} <= {"connect_failed", "disconnected"}
    assert edge.url == url
    assert {**edge.pids(), "gateway": 0} == {**pids, "gateway": 0}, "no replica was disturbed"
    with edge.load(tmp_path, 30, 1) as load:
        ran = load.finish()
        assert ran.outcomes == load.counted() == {"on_time": load.tasks}
