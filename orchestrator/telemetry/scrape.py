"""Direct scrape: reads the exposition page of a stage or a gateway, with no Prometheus server between."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.telemetry import exposition, fetch
from orchestrator.telemetry.exposition import Sample
from orchestrator.telemetry.fetch import NoAnswer


class Scrape:
    """Reads pages. `clock` is the one that samples are dated by."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._client = fetch.client()

    async def read(self, url: str) -> Sample | None:
        """The page as it is now; None where there is no answer in time, or none that is an exposition."""
        try:
            page = await fetch.get(self._client, f"{url}/metrics")
            return exposition.parse(page.decode(), self._clock())
        except (NoAnswer, ValueError):
            # Who asked lets the source age, and the age is what the policy and the metrics go by.
            return None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
