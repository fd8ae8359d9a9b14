"""Bringing the orchestrator process up and down, for the command line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.client import Client, connect
from orchestrator.errors import RunFailed, SetupFailed
from orchestrator.runtimes import child as children
from orchestrator.runtimes.child import Identity
from orchestrator.runtimes.records import Records
from orchestrator.state_dir import Daemon, StateDir
from orchestrator.testbed import Loaded

ROOT = Path(__file__).resolve().parents[1]
"""Where the package lies; put on the path of what we start, so that it can be started from any directory."""
POLL_S = 0.05
STOP_LIMIT_S = 60.0
LOG_TAIL_LINES = 8


@dataclass(frozen=True, slots=True)
class Start:
    """How to start the orchestrator."""

    testbed: Path
    models_dir: Path
    modules: tuple[str, ...] = ()
    """Options of `orchestrator.daemon` that name other modules for stage and gateway."""

    def argv(self, state: StateDir) -> list[str]:
        """Command line of the orchestrator process."""
        places = ["--state-dir", str(state.root), "--models-dir", str(self.models_dir)]
        return [sys.executable, "-m", "orchestrator.daemon", str(self.testbed), *places, *self.modules]


def bring_up(
    start: Start, loaded: Loaded, state: StateDir, limit_s: float, show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Start the orchestrator unless it runs already, and wait until every pipeline can be served; standbys may still load.

    One that was started from another version of the testbed file is replaced; what it runs is adopted.

    Args:
        start: how to start it.
        loaded: the testbed file, checked.
        state: where it keeps its state.
        limit_s: longest wait [s].
        show: called with every status on the way.

    Returns:
        The status when everything was ready.

    Raises:
        SetupFailed: it ended, or was not ready within the limit.
    """
    end = time.monotonic() + limit_s
    daemon = state.read_daemon()
    process = None
    if daemon is None or not daemon.is_alive():
        process = _launch(start, state, fresh=daemon is None)
    elif daemon.sha256 != loaded.sha256:
        _end(daemon)
        process = _launch(start, state, fresh=False)
    with _connected(state, process, end) as client:
        try:
            for status in client.watch(max(0.0, end - time.monotonic()), lambda status: bool(status["ready"])):
                show(status)
                _check(process, state)
        except RunFailed as error:
            _check(process, state)
            raise SetupFailed(f"{error}; logs are in {state.root}; espalier down removes what runs") from None
        return status


def take_down(state: StateDir) -> int:
    """Drain and stop everything that runs in a state directory; returns how many processes had to be swept up.

    Raises:
        RunFailed: the orchestrator did not end in time.
    """
    daemon = state.read_daemon()
    if daemon is not None and daemon.is_alive():
        with connect(state) as client:
            client.shut_down()
        _wait_for_end(daemon, STOP_LIMIT_S)
    # Whatever an orchestrator that died left behind.
    swept = asyncio.run(_sweep(state))
    state.clear()
    return swept


def _launch(start: Start, state: StateDir, *, fresh: bool) -> Identity:
    state.root.mkdir(parents=True, exist_ok=True)
    if fresh:
        shutil.rmtree(state.root / "logs", ignore_errors=True)
        state.log.unlink(missing_ok=True)
    return children.launch(start.argv(state), log=state.log, environment=children.environment(ROOT))


def _connected(state: StateDir, process: Identity | None, end: float) -> Client:
    """A client of the orchestrator, as soon as it answers."""
    while True:
        _check(process, state)
        with contextlib.suppress(RunFailed):
            client = connect(state)
            if process is None or client.daemon.pid == process.pid:
                client.status()
                return client
        if time.monotonic() > end:
            raise SetupFailed(f"the orchestrator does not answer; its log: {state.log}")
        time.sleep(POLL_S)


def _check(process: Identity | None, state: StateDir) -> None:
    if process is None or children.recognise(process):
        return
    lines = state.log.read_text(errors="replace").splitlines()
    said = [line.removeprefix("espalier: ") for line in lines if line.startswith("espalier: ")]
    raise SetupFailed("\n".join(said[-1:] or ["the orchestrator ended:", *lines[-LOG_TAIL_LINES:]]))


def _end(daemon: Daemon) -> None:
    """End an orchestrator and leave what it runs."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(daemon.pid, signal.SIGTERM)
    _wait_for_end(daemon, STOP_LIMIT_S)


def _wait_for_end(daemon: Daemon, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while daemon.is_alive():
        if time.monotonic() > end:
            raise RunFailed(f"the orchestrator (process {daemon.pid}) does not end; see its log")
        time.sleep(POLL_S)


async def _sweep(state: StateDir) -> int:
    found = [
        (records, record, child)
        for records in (Records(state.root / "gateways"), Records(state.root / "replicas"))
        for record in records.all()
        if (child := children.adopt(record.identity)) is not None
    ]
    await asyncio.gather(*(child.stop(10.0) for _, _, child in found))
    for records, record, _ in found:
        records.forget(record.id)
    return len(found)
