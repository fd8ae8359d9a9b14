"""Keeps the gateway's table current: a long poll to the orchestrator, and a copy on disk for when there is none to ask."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from services.dataplane import routes
from services.dataplane.routes import Routes
from services.gateway.table import Table
from services.transport import TimedOut, Transport, Unreachable

log = logging.getLogger(__name__)

WAIT_S = 20.0
"""How long the orchestrator may hold a poll; it answers at once when something changes."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


class Subscription:
    """The newest table there is. `follow` it in the background; read `table` at any time."""

    def __init__(self, url: str | None, file: Path | None, name: str, on_change: Callable[[Table], None]) -> None:
        self._url = url
        self._file = file
        self._name = name
        self._on_change = on_change
        kept = routes.load(file) if file is not None else None
        self.table = Table(kept or routes.empty())
        on_change(self.table)

    async def follow(self, transport: Transport) -> None:
        """Poll for ever; while the orchestrator is away, go on with the last document and ask again ever more slowly."""
        if self._url is None:
            return
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                fresh = await self._poll(transport, self._url)
            except (Unreachable, TimedOut, ValidationError, ValueError) as error:
                log.warning("routes: %s; keeping version %d, asking again", error, self.table.routes.version)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                continue
            pause_s = FIRST_PAUSE_S
            if fresh is not None:
                self._apply(fresh)

    async def _poll(self, transport: Transport, url: str) -> Routes | None:
        after = self.table.routes.version
        answer = await transport.get(f"{url}?after={after}&wait={WAIT_S:g}&gateway={self._name}", WAIT_S + 10)
        if answer.status == 304:
            return None
        if answer.status != 200:
            raise ValueError(f"the orchestrator answered HTTP {answer.status}")
        return Routes.model_validate_json(answer.body)

    def _apply(self, fresh: Routes) -> None:
        self.table = Table(fresh)
        self._on_change(self.table)
        log.info("routes: version %d", fresh.version)
        if self._file is not None:
            try:
                routes.save(fresh, self._file)
            except OSError as error:
                log.warning("routes: version %d could not be kept on disk: %s", fresh.version, error)
