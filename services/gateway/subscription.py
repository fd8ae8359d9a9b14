"""Keeps the gateway's table current: a long poll to the orchestrator, and a copy on disk for when there is none to ask.

Where several control planes may lead, one is asked until it fails, then the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlencode

from pydantic import ValidationError

from services.dataplane import routes
from services.dataplane.routes import Routes
from services.gateway.table import Table
from services.transport import TimedOut, Transport, Unreachable

log = logging.getLogger(__name__)

WAIT_S, WAIT_OF_SEVERAL_S = 20.0, 5.0
"""How long the orchestrator may hold a poll; it answers at once when something changes. Where there is another one to ask, a
box that is gone without a word must be noticed sooner."""
MARGIN_S = 5.0
"""Longest wait for an answer beyond that [s]."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


class Subscription:
    """The newest table there is. `follow` it in the background; read `table` at any time."""

    def __init__(
        self,
        urls: Sequence[str],
        file: Path | None,
        name: str,
        on_change: Callable[[Table], None],
        *,
        node: str = "",
        port: int | None = None,
    ) -> None:
        """Begin with what is on disk.

        Args:
            urls: where the routes are published; none: what is on disk is all there will be.
            file: the copy on disk.
            name: of this gateway, as the orchestrator calls it.
            on_change: called with every new table.
            node: it runs on.
            port: it listens on; the orchestrator sees its address from where it asks.
        """
        self._urls = tuple(urls)
        self._turn = 0
        self._file = file
        self._on_change = on_change
        self._who = {"gateway": name, **({"node": node} if node else {}), **({"port": port} if port else {})}
        self._wait_s = WAIT_S if len(self._urls) < 2 else WAIT_OF_SEVERAL_S
        kept = routes.load(file) if file is not None else None
        self.table = Table(kept or routes.empty())
        on_change(self.table)

    @property
    def url(self) -> str | None:
        """The control plane that is asked now."""
        return self._urls[self._turn % len(self._urls)] if self._urls else None

    async def follow(self, transport: Transport) -> None:
        """Poll for ever; while no orchestrator answers, go on with the last document and ask again ever more slowly."""
        pause_s = FIRST_PAUSE_S
        while (url := self.url) is not None:
            try:
                fresh = await self._poll(transport, url)
            except (Unreachable, TimedOut, ValidationError, ValueError) as error:
                log.warning("routes: %s; keeping version %d, asking again", error, self.table.routes.version)
                self._turn += 1
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                continue
            pause_s = FIRST_PAUSE_S
            if fresh is not None:
                self._apply(fresh)

    async def _poll(self, transport: Transport, url: str) -> Routes | None:
        after = self.table.routes.version
        question = urlencode({"after": after, "wait": f"{self._wait_s:g}", **self._who})
        answer = await transport.get(f"{url}?{question}", self._wait_s + MARGIN_S)
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
