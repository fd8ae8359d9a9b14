"""All gateways of a testbed: the one that is kept here or given, and those that only ask for the routes, wherever they are.

A gateway that asks says its name, node and port, so nothing has to be listed anywhere: one more box with a gateway on it is one
more caller. The readiness of each is looked at; one that answers nothing three times in a row is gone: no drain waits for it,
and its last counts age no observation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from orchestrator.given_gateway import Seen
from orchestrator.routes import Caller
from orchestrator.runtimes.doorkeeper import NAME
from orchestrator.runtimes.records import Record
from orchestrator.telemetry.sources import Endpoint
from services.dataplane.routes import ReplicaState

log = logging.getLogger(__name__)

POLL_S, ANSWER_S = 1.0, 1.0
TRIES = 3
"""A gateway that answers nothing so many times in a row is gone."""


class Kept(Protocol):
    """One gateway that is known beforehand: `Doorkeeper`, `GivenGateway`."""

    @property
    def record(self) -> Record | Seen | None:
        """What is known of it; None before its first start."""

    async def open(self) -> None:
        """Begin to look after it."""

    async def close(self) -> None:
        """Everything ends, so it does too, if it is ours."""

    async def leave(self) -> None:
        """Stop looking after it; it goes on."""


@dataclass(slots=True)
class _Looked:
    state: ReplicaState = "starting"
    silent: int = 0


class Gateways:
    """See the module."""

    def __init__(
        self, heard: Callable[[], Mapping[Caller, int]], drop: Callable[[Caller], None], kept: Kept | None = None
    ) -> None:
        """Know nobody but the one that is known beforehand.

        Args:
            heard: who asks for the routes, and the version each has applied.
            drop: called with one that is gone.
            kept: one that is known beforehand, called `doorkeeper.NAME`.
        """
        self.kept = kept
        self._heard, self._drop = heard, drop
        self._looked: dict[Caller, _Looked] = {}
        self._client = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False, limits=httpx.Limits(max_connections=None))
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to look.

        Raises:
            SetupFailed: the one that is kept here cannot have its port.
        """
        if self.kept is not None:
            await self.kept.open()
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop the one that is kept here, and look no more."""
        if self.kept is not None:
            await self.kept.close()
        await self._rest()

    async def leave(self) -> None:
        """Look no more; every gateway goes on."""
        if self.kept is not None:
            await self.kept.leave()
        await self._rest()

    @property
    def record(self) -> Record | Seen | None:
        """The one that stands for all: the kept one, else the first by name that is ready, else the first."""
        if self.kept is not None:
            return self.kept.record
        found = sorted(self._callers(), key=lambda caller: (self._state(caller) != "ready", caller.name, caller.url))
        return Seen(found[0].url, self._state(found[0])) if found else None

    def endpoints(self) -> list[Endpoint]:
        """Who is asked what became of the tasks."""
        kept = self.kept.record if self.kept is not None else None
        first = [Endpoint(NAME, kept.url)] if kept is not None and kept.state == "ready" else []
        return [*first, *(Endpoint(caller.name, caller.url) for caller in self._callers())]

    def status(self) -> list[dict[str, Any]]:
        """Name, node, address, state and applied version of each; those of one that has not asked yet are None."""
        heard = self._heard()
        rows = [_row(caller.name, caller.url, self._state(caller), (caller, heard[caller])) for caller in self._callers()]
        if self.kept is not None and (kept := self.kept.record) is not None:
            ours = next(((caller, version) for caller, version in heard.items() if caller.name == NAME), None)
            rows.insert(0, _row(NAME, kept.url, kept.state, ours))
        return rows

    def _callers(self) -> list[Caller]:
        ours = NAME if self.kept is not None else None
        return sorted((c for c in self._heard() if c.url and c.name != ours), key=lambda caller: (caller.name, caller.url))

    def _state(self, caller: Caller) -> ReplicaState:
        return self._looked[caller].state if caller in self._looked else "starting"

    async def _rest(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    async def _watch(self) -> None:
        while True:
            callers = self._callers()
            self._looked = {caller: self._looked.get(caller, _Looked()) for caller in callers}
            await asyncio.gather(*(self._look(caller, looked) for caller, looked in self._looked.items()))
            await asyncio.sleep(POLL_S)

    async def _look(self, caller: Caller, looked: _Looked) -> None:
        state: ReplicaState = "starting"
        looked.silent += 1
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
            answer = await self._client.get(f"{caller.url}/v2/health/ready")
            state, looked.silent = ("ready" if answer.status_code == 200 else "starting"), 0
        if state != looked.state:
            log.info("%s on %s at %s: %s", caller.name, caller.node or "no node", caller.url, state)
        looked.state = state
        if looked.silent == TRIES:
            log.warning("%s on %s at %s: gone", caller.name, caller.node or "no node", caller.url)
            looked.silent = 0
            self._drop(caller)


def _row(name: str, url: str, state: ReplicaState, heard: tuple[Caller, int] | None) -> dict[str, Any]:
    node, version = (None, None) if heard is None else (heard[0].node, heard[1])
    return {"name": name, "node": node, "url": url, "state": state, "version": version}
