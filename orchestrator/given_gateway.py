"""A gateway that somebody else keeps running (Docker Compose, say): looked at, never started or stopped.

Its presence also tells why we are told to stop. `docker compose down` removes the gateway before the orchestrator, since the
one depends on the other; a restart or an upgrade of the orchestrator leaves it where it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

import httpx

from services.dataplane.routes import ReplicaState

log = logging.getLogger(__name__)

POLL_S = 0.5
ANSWER_S = 1.0
TRIES = 3
"""How often it is knocked at before it counts as gone."""
PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of it."""

    url: str
    state: ReplicaState = "starting"
    """`ready` or `starting`; one that cannot be reached is starting, since somebody will see to it."""
    pid: int | None = None


class GivenGateway:
    """One gateway at a fixed address."""

    def __init__(self, url: str) -> None:
        self.record = Seen(url.rstrip("/"))
        self._client = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False)
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to look at it."""
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._client.aclose()

    async def leave(self) -> None:
        """As `close`: the gateway goes on either way."""
        await self.close()

    async def is_there(self) -> bool:
        """Whether anything listens at its address."""
        address = httpx.URL(self.record.url)
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(PAUSE_S)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(ANSWER_S):
                    _, writer = await asyncio.open_connection(address.host, address.port or 80)
                writer.close()
                return True
        return False

    async def _watch(self) -> None:
        while True:
            state: ReplicaState = "starting"
            with contextlib.suppress(httpx.HTTPError):
                answer = await self._client.get(f"{self.record.url}/v2/health/ready")
                state = "ready" if answer.status_code == 200 else "starting"
            if state != self.record.state:
                log.info("gateway at %s: %s", self.record.url, state)
                self.record = Seen(self.record.url, state)
            await asyncio.sleep(POLL_S)
