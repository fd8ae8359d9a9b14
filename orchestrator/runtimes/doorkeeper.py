"""Keeps the gateway process alive: starts it, takes it up after our own restart, and starts it again when it dies.

The gateway is no replica: it is not scaled and not routed to, and its address is a promise to clients, so it always comes
back on the same port.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from orchestrator.errors import SetupFailed
from orchestrator.runtimes import child as children
from orchestrator.runtimes.backoff import Backoff
from orchestrator.runtimes.child import Child
from orchestrator.runtimes.keeper import READY_ANSWER_S, poll_ready
from orchestrator.runtimes.processes import LISTEN_BACKLOG
from orchestrator.runtimes.records import Record, Records
from services.dataplane.routes import ReplicaState

log = logging.getLogger(__name__)

NAME = "gateway-1"
STOP_GRACE_S = 10.0
"""The gateway may finish the tasks it has [s]."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where the gateway stands."""

    node: str
    host: str
    port: int
    """0: any free one, the same again for as long as its record is there."""


class Doorkeeper:
    """One gateway process and its state."""

    def __init__(
        self,
        *,
        state_dir: Path,
        argv: Sequence[str],
        door: Door,
        environment: Mapping[str, str],
        on_death: Callable[[str], None],
    ) -> None:
        self._log = state_dir / "logs" / f"{NAME}.log"
        self._records = Records(state_dir / "gateways")
        self._argv = tuple(argv)
        self._door = door
        self._environment = environment
        self._on_death = on_death
        self._record: Record | None = None
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None
        self._client = httpx.AsyncClient(timeout=READY_ANSWER_S, trust_env=False)

    @property
    def record(self) -> Record | None:
        """What is known of the process: its address, pid and state; None before the first start."""
        return self._record

    async def open(self) -> None:
        """Adopt the gateway that runs, or start one; then keep it alive.

        Raises:
            SetupFailed: the port is taken by somebody else.
        """
        found = next(iter(self._records.all()), None)
        child = children.adopt(found.identity) if found is not None and found.identity is not None else None
        if found is not None and child is not None and found.specification == self._specification:
            self._record, self._child = found, child
        else:
            if child is not None:
                # Started for another testbed file: the port can have only one owner, so the old one goes first.
                await child.stop(STOP_GRACE_S)
            self._start(self._door.port or (_port_of(found) if found else 0))
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Stop the gateway and wait until it has gone."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._child is not None and self._record is not None:
            await self._child.stop(STOP_GRACE_S)
            self._records.forget(self._record.id)
        self._on_death(NAME)
        await self._client.aclose()

    async def leave(self) -> None:
        """Stop keeping; the gateway goes on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._child is not None:
            self._child.release()
        await self._client.aclose()

    @property
    def _shared(self) -> tuple[str, ...]:
        return (*self._argv, "--node", self._door.node, "--host", self._door.host)

    @property
    def _specification(self) -> str:
        return json.dumps(self._shared)

    def _start(self, port: int) -> None:
        with listen(self._door.host, port) as listener:
            port = int(listener.getsockname()[1])
            argv = (*self._shared, "--name", NAME, "--fd", str(listener.fileno()))
            child = children.spawn(argv, log=self._log, environment=self._environment, inherited=[listener.fileno()])
        self._child = child
        self._record = Record(
            id=NAME, kind="gateway", service=NAME, node=self._door.node, url=f"http://{self._door.host}:{port}",
            state="starting", specification=self._specification, pid=child.identity.pid,
            create_time=child.identity.create_time, argv=argv,
        )  # fmt: skip
        self._records.save(self._record)
        log.info("%s: started as process %d at %s", NAME, self._record.pid, self._record.url)

    async def _keep(self) -> None:
        """Until cancelled: wait for readiness, then for death; start again after a pause."""
        backoff = Backoff()
        loop = asyncio.get_running_loop()
        while self._child is not None and self._record is not None:
            began = loop.time()
            loading = asyncio.create_task(self._load())
            try:
                await self._child.exited.wait()
            finally:
                loading.cancel()
            backoff = backoff.after_failure(loop.time(), loop.time() - began)
            log.warning("%s died with status %s; its log: %s", NAME, self._child.exit_code, self._log)
            self._set("starting")
            self._on_death(NAME)
            while not await self._start_again(_port_of(self._record), backoff.until - loop.time()):
                backoff = backoff.after_failure(loop.time(), 0.0)

    async def _start_again(self, port: int, pause_s: float) -> bool:
        await asyncio.sleep(max(0.0, pause_s))
        try:
            self._start(port)
        except (SetupFailed, OSError) as error:
            log.warning("%s: %s; trying again", NAME, error)
            return False
        return True

    async def _load(self) -> None:
        if self._record is not None and self._record.state == "starting":
            url = self._record.url
            await poll_ready(self._client, lambda: url)
            self._set("ready")

    def _set(self, state: ReplicaState) -> None:
        if self._record is not None:
            self._record = self._record.model_copy(update={"state": state})
            self._records.save(self._record)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        SetupFailed: somebody else has the port.
    """
    try:
        return socket.create_server((host, port), backlog=LISTEN_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise SetupFailed(
            f"the gateway cannot have {host}:{port}: {reason}; free it, or choose another port under gateway"
        ) from None


def _port_of(record: Record) -> int:
    return httpx.URL(record.url).port or 80
