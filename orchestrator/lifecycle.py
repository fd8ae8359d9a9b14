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
from orchestrator.errors import RunFailed, SetupFailed, UsageError
from orchestrator.runtimes import child as children
from orchestrator.runtimes import engine, swarm
from orchestrator.runtimes.child import Identity
from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.records import Records
from orchestrator.state_dir import LEASE, Daemon, StateDir
from orchestrator.testbed import Loaded

ROOT = Path(__file__).resolve().parents[1]
"""Where the package lies; put on the path of what we start, so that it can be started from any directory."""
POLL_S = 0.05
STOP_LIMIT_S = 60.0
ENDING_S = 2.0
"""An orchestrator that does not answer any more may take this long to be gone [s]."""
SWEEP_GRACE_S = 10.0
"""What an orchestrator left behind may finish what it has [s]."""
LOG_TAIL_LINES = 8


@dataclass(frozen=True, slots=True)
class Start:
    """How to start the orchestrator."""

    testbed: Path
    models_dir: Path
    options: tuple[str, ...] = ()
    """Further options of `orchestrator.daemon`."""
    orchestrators: int = 1
    """How many; all but one wait until it is their turn."""

    def argv(self, state: StateDir) -> list[str]:
        """Command line of the orchestrator process."""
        places = ["--state-dir", str(state.root), "--models-dir", str(self.models_dir)]
        several = [LEASE] if self.orchestrators > 1 else []
        return [sys.executable, "-m", "orchestrator.daemon", str(self.testbed), *places, *several, *self.options]


def bring_up(
    start: Start, loaded: Loaded, state: StateDir, limit_s: float, show: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Start the orchestrator, or update the one that runs, and wait until every pipeline can be served.

    Standbys may still load then.

    Args:
        start: how to start it.
        loaded: the testbed file, checked.
        state: where it keeps its state.
        limit_s: longest wait [s].
        show: called with every status on the way.

    Returns:
        The status when everything was ready.

    Raises:
        SetupFailed: it ended, was not ready within the limit, or went back to what was there before.
    """
    end = time.monotonic() + limit_s
    daemon = state.read_daemon()
    if daemon is not None and daemon.is_alive():
        if start.orchestrators > 1 and not daemon.one_of_several:
            raise UsageError("its orchestrator was started as the only one; take it down first (espalier down)")
        with connect(state) as client:
            status = update(client, loaded, limit_s, show)
        _launch_waiting(start, loaded, state)
        return status
    process = _launch(start, state, fresh=daemon is None)
    with _connected(state, process, end) as client:
        try:
            status = client.status()
            if status["sha256"] != loaded.sha256 and status["update"] is None:
                # It took up what was in force when its predecessor ended, and that was another file.
                client.update(loaded.text, loaded.path, limit_s)
            for status in client.watch(max(0.0, end - time.monotonic()), _is_up):
                show(status)
                _check(process, state)
        except RunFailed as error:
            # One that cannot be set up ends soon after it has answered for the first time; then its own words say why.
            _wait_for_end_of(process)
            _check(process, state)
            raise SetupFailed(f"{error}; logs are in {state.root}; espalier down removes what runs") from None
    _launch_waiting(start, loaded, state)
    return _updated(status)


def _launch_waiting(start: Start, loaded: Loaded, state: StateDir) -> None:
    """Start as many more orchestrators as there should be."""
    for _ in range(len(state.read_waiting()), start.orchestrators - 1):
        process = _launch(start, state, fresh=False)
        # They write this down themselves, but not before `down` may look for them.
        state.save_waiting(
            Daemon(
                pid=process.pid, create_time=process.create_time, argv=process.argv, url="",
                testbed=loaded.testbed.name, sha256=loaded.sha256,
            )
        )  # fmt: skip


def update(client: Client, loaded: Loaded, limit_s: float, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Have a running orchestrator go over to a testbed file, to models exported anew and to images built anew.

    Raises:
        SetupFailed: it went back to what was there before.
    """
    client.update(loaded.text, loaded.path, limit_s)
    # Twice: going back takes its time as well.
    return wait_until_up(client, 2 * limit_s, show)


def wait_until_up(client: Client, limit_s: float, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Wait until every pipeline can be served and no update is under way.

    Raises:
        RunFailed: it was not so within the limit.
        SetupFailed: an update was rolled back.
    """
    for status in client.watch(limit_s, _is_up):
        show(status)
    return _updated(status)


def _is_up(status: dict[str, Any]) -> bool:
    under_way = status["update"] is not None and status["update"]["state"] not in ("done", "rolled_back")
    return bool(status["ready"]) and not under_way


def _updated(status: dict[str, Any]) -> dict[str, Any]:
    if status["update"] is not None and status["update"]["state"] == "rolled_back":
        raise SetupFailed(f"rolled back: {status['update']['reason']}")
    return status


def take_down(state: StateDir) -> int:
    """Drain and stop everything that runs in a state directory; returns how many replicas and gateways had to be swept up.

    Raises:
        RunFailed: the orchestrator did not end in time, or its containers cannot be reached.
    """
    # First those that would take over.
    for waiting in state.read_waiting():
        with contextlib.suppress(ProcessLookupError):
            os.kill(waiting.pid, signal.SIGTERM)
    daemon = state.read_daemon()
    if daemon is not None and daemon.is_alive():
        try:
            with connect(state) as client:
                client.shut_down()
        except RunFailed:
            # One that was killed a moment ago does not answer, and may still be seen.
            _wait_for_end_of(daemon.identity)
            if daemon.is_alive():
                raise
        _wait_for_end(daemon, STOP_LIMIT_S)
    # Whatever an orchestrator that died left behind.
    swept = asyncio.run(_sweep(state, daemon.testbed if daemon is not None else None))
    state.clear()
    return swept


def _launch(start: Start, state: StateDir, *, fresh: bool) -> Identity:
    state.root.mkdir(parents=True, exist_ok=True)
    if fresh:
        shutil.rmtree(state.root / "logs", ignore_errors=True)
        state.log.unlink(missing_ok=True)
    return children.launch(start.argv(state), log=state.log, environment=children.environment(ROOT))


def _connected(state: StateDir, process: Identity, end: float) -> Client:
    """A client of the orchestrator, as soon as it answers."""
    while True:
        _check(process, state)
        daemon = state.read_daemon()
        if daemon is not None and daemon.pid == process.pid:
            with contextlib.suppress(RunFailed):
                client = connect(state)
                client.status()
                return client
        if time.monotonic() > end:
            raise SetupFailed(f"the orchestrator does not answer; its log: {state.log}")
        time.sleep(POLL_S)


def _wait_for_end_of(process: Identity) -> None:
    """A moment for a process that is about to end."""
    end = time.monotonic() + ENDING_S
    while children.recognise(process) and time.monotonic() < end:
        time.sleep(POLL_S)


def _check(process: Identity, state: StateDir) -> None:
    if children.recognise(process):
        return
    lines = state.log.read_text(errors="replace").splitlines()
    said = [line.removeprefix("espalier: ") for line in lines if line.startswith("espalier: ")]
    raise SetupFailed("\n".join(said[-1:] or ["the orchestrator ended:", *lines[-LOG_TAIL_LINES:]]))


def _wait_for_end(daemon: Daemon, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while daemon.is_alive():
        if time.monotonic() > end:
            raise RunFailed(f"the orchestrator (process {daemon.pid}) does not end; see its log")
        time.sleep(POLL_S)


async def _sweep(state: StateDir, testbed: str | None) -> int:
    replicas, gateways = Records(state.root / "replicas"), Records(state.root / "gateways")
    found = [
        (records, record, child)
        for records in (gateways, replicas)
        for record in records.all()
        if record.identity is not None and (child := children.adopt(record.identity)) is not None
    ]
    await asyncio.gather(*(child.stop(SWEEP_GRACE_S) for _, _, child in found))
    for records, record, _ in found:
        records.forget(record.id)
    left = list(replicas.all())
    swept = len(found)
    try:
        if testbed is not None and any(record.container is not None for record in left):
            swept += await engine.sweep(state.scope(testbed), SWEEP_GRACE_S)
        if testbed is not None and any(record.task is not None for record in left):
            swept += await swarm.sweep(state.scope(testbed), SWEEP_GRACE_S)
    except Unreachable as error:
        raise RunFailed(f"{error}; its containers are still there: say espalier down again when it does") from None
    return swept
