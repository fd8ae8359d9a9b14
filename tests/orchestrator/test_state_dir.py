from __future__ import annotations

from pathlib import Path

import psutil

from orchestrator.state_dir import Daemon, StateDir


def me() -> Daemon:
    this = psutil.Process()
    return Daemon(
        pid=this.pid,
        create_time=this.create_time(),
        argv=tuple(this.cmdline()),
        url="http://127.0.0.1:1",
        testbed="t",
        sha256="",
    )


def test_an_orchestrator_is_found_by_its_record_while_it_lives(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    assert state.read_daemon() is None
    state.save_daemon(me())
    found = state.read_daemon()
    assert found == me()
    assert found is not None
    assert found.is_alive()
    assert not found.model_copy(update={"create_time": found.create_time - 100}).is_alive()


def test_a_testbed_that_is_down_keeps_its_logs_decisions_and_version(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.save_daemon(me())
    for path in (
        state.log,
        state.decisions,
        state.routes,
        state.orders,
        state.gateway_routes,
        tmp_path / "replicas" / "x.json",
    ):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    state.clear()
    assert {path.name for path in tmp_path.iterdir()} == {"orchestrator.log", "decisions.jsonl", "routes.json"}
