"""Tells the orchestrator which standbys this gateway has let out. No task waits for it.

The gateway uses a standby from the moment it lets it out. Until the orchestrator has answered, it is told again and again, and
a new document that still calls the replica a standby does not count. A refusal takes it back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from urllib.parse import urljoin

import orjson

from services.gateway.table import Table
from services.transport import TimedOut, Transport, Unreachable

log = logging.getLogger(__name__)

ANSWER_S = 1.0
"""Longest wait for one answer [s]."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


class Announcer:
    """At most one coroutine for each standby; use it inside the event loop, and `close` it at the end."""

    def __init__(self, routes_url: Callable[[], str | None], transport: Transport, refused: Callable[[str, str], None]) -> None:
        """Begin with nothing to tell.

        Args:
            routes_url: where the orchestrator publishes the routes now; without one there is nobody to tell.
            transport: the connections.
            refused: called with service and replica when the orchestrator does not let it out.
        """
        self._routes_url = routes_url
        self._transport = transport
        self._refused = refused
        self._telling: dict[tuple[str, str], asyncio.Task[None]] = {}

    def tell(self, service: str, replica: str) -> None:
        """A standby has been let out."""
        key = service, replica
        if self._routes_url() is not None and key not in self._telling:
            task = self._telling[key] = asyncio.ensure_future(self._tell(service, replica))
            task.add_done_callback(lambda _: self._telling.pop(key, None))

    def settle(self, table: Table) -> None:
        """New routes: what the orchestrator has not heard of yet stays let out, if they allow it; the rest is told no more."""
        for (service, replica), task in self._telling.items():
            target = table.targets.get(service)
            found = [s for s in target.standbys if s.candidate.replica == replica] if target is not None else []
            if found:
                table.let_out(service, found[0])
            else:
                task.cancel()

    async def close(self) -> None:
        """Tell nothing more."""
        tasks = list(self._telling.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, service: str, replica: str) -> None:
        body = orjson.dumps({"service": service, "replica": replica})
        pause_s = FIRST_PAUSE_S
        while (routes_url := self._routes_url()) is not None:
            url = urljoin(routes_url, "let-out")
            try:
                answer = await self._transport.post(url, body, {"content-type": "application/json"}, ANSWER_S)
            except (Unreachable, TimedOut) as error:
                problem = str(error)
            else:
                problem = f"the orchestrator answered HTTP {answer.status}"
                if answer.status < 300:
                    return
                if answer.status < 500:
                    log.warning("let out: %s is taken back: %s: %r", replica, problem, answer.body[:200])
                    self._refused(service, replica)
                    return
            log.warning("let out: %s, but it could not be told: %s; telling again", replica, problem)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
