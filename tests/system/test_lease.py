"""Two orchestrators: one leads, the other takes over when it is gone, and the data plane notices nothing."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.state_dir import Daemon
from tests.system.edge import Edge, running, until

TAKEOVER_S = 15.0


@pytest.fixture
def pair(minilm: Path, tmp_path: Path) -> Iterator[Edge]:
    shutil.copytree(minilm, tmp_path / "models" / minilm.name, copy_function=os.link)
    with running(Edge(tmp_path, tmp_path / "models", options=("--orchestrators", "2"))) as edge:
        until(lambda: len(edge.state.read_waiting()) == 1, "the second one waits")
        yield edge


def leader(edge: Edge) -> Daemon:
    found = edge.state.read_daemon()
    assert found is not None
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_the_other_takes_over_within_15_s_and_no_task_is_lost(pair: Edge, tmp_path: Path, number: signal.Signals) -> None:
    pids, first = pair.pids(), leader(pair)
    (waiting,) = pair.state.read_waiting()
    with pair.load(tmp_path, 20, 14) as load:
        load.wait_for(20)
        began = time.monotonic()
        os.kill(first.pid, number)
        until(lambda: leader(pair).pid == waiting.pid, "the other leads", TAKEOVER_S)
        # It leads when it answers, and gateways hear of what it decides.
        until(lambda: pair.status()["ready"], "it answers", TAKEOVER_S)
        assert time.monotonic() - began < TAKEOVER_S
        pair.espalier("scale", "pool", "1", "--wait")
        version = pair.status()["version"]
        until(lambda: pair.gauge("espalier_gateway_routes_version") == version, "the gateway listens to it")
        ran = load.finish()
    assert ran.outcomes == {"on_time": load.tasks}
    after = pair.pids()
    assert {name: pid for name, pid in pids.items() if name in after} == after, "no replica was restarted"
    assert len(after) == len(pids) - 1, "and the order was carried out"
    assert not first.is_alive(), "the one that led does not come back"


def test_up_brings_back_the_one_that_waits_and_down_ends_both(pair: Edge) -> None:
    os.kill(leader(pair).pid, signal.SIGKILL)
    until(lambda: not pair.state.read_waiting(), "the other leads", TAKEOVER_S)
    until(lambda: leader(pair).is_alive(), "the other leads", TAKEOVER_S)
    pair.up()
    until(lambda: len(pair.state.read_waiting()) == 1, "another one waits")
    pair.down()
    assert pair.running() == []
    pair.up()
