"""The telemetry of a running testbed: through a Prometheus server, and by direct scrape of whatever that does not have.

Every source is read once a slot. Of which the server has a fresh sample, that one is taken; every other source is scraped
directly in the same slot. So a server that is dead, one that has not discovered a replica yet, and one that cannot reach it
are the same case, and cost the observation nothing but the way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from orchestrator.core import Observation, Replica
from orchestrator.telemetry import sources
from orchestrator.telemetry.exposition import Sample
from orchestrator.telemetry.fetch import NoAnswer
from orchestrator.telemetry.prometheus import Place, Prometheus
from orchestrator.telemetry.scrape import Scrape
from orchestrator.telemetry.sources import Endpoint, Source

log = logging.getLogger(__name__)

FRESH_S = 2.5
"""The server's newest sample of a source may be this old [s].

It scrapes every second, so a sample is up to 1 s old when a slot begins, and 2 s after one scrape that failed: that is no
reason to go and ask. After two it is; then half of `stale_after` (5 s unless the testbed says otherwise) is left to ask in.
"""
PROMETHEUS, SCRAPE = "prometheus", "scrape"


class Live:
    """See the module, and `orchestrator.core.Telemetry`. `clock` is the one the runner takes t from."""

    def __init__(
        self,
        gateways: Callable[[], Sequence[Endpoint]],
        prometheus_url: str | None = None,
        stale_after_s: Callable[[], float] = lambda: 2 * FRESH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gateways, self._stale_after_s, self._clock = gateways, stale_after_s, clock
        self._scrape = Scrape(clock)
        self._server = Prometheus(prometheus_url, clock) if prometheus_url is not None else None
        self._server_answers = self._server is not None
        self._sources: dict[Endpoint, Source] = {}
        self.used = {PROMETHEUS: 0, SCRAPE: 0}
        """How many sources the last slot read through which telemetry."""

    async def observe(self, t: float, replicas: Sequence[Replica]) -> Observation:
        """Read every source; takes at most twice `fetch.ANSWER_S`, and that only in the slot in which the server is lost."""
        gateways = list(self._gateways())
        endpoints = [*sources.sampled(replicas), *gateways]
        self._sources = {endpoint: self._sources.get(endpoint) or Source(t) for endpoint in endpoints}
        for source in self._sources.values():
            source.begin()
        if self._server_answers:
            unread = self._take(await self._ask_server())
            await self._read(unread)
        else:
            # A server that hangs must not delay every slot, so nobody waits for its answer first.
            unread = endpoints
            await asyncio.gather(self._read(unread), self._ask_server())
        self.used = {PROMETHEUS: len(endpoints) - len(unread), SCRAPE: len(unread)}
        return sources.observe(t, self._clock(), replicas, gateways, self._sources)

    def ages_s(self) -> dict[str, float]:
        """Age of every source [s], by address."""
        now = self._clock()
        return {endpoint.url: source.age_s(now) for endpoint, source in self._sources.items()}

    async def close(self) -> None:
        """Close the connections."""
        await self._scrape.close()
        if self._server is not None:
            await self._server.close()

    async def _ask_server(self) -> dict[Place, tuple[Sample, ...]]:
        """What the server has; nothing where there is none, or it does not answer."""
        if self._server is None:
            return {}
        try:
            found = await self._server.newest()
        except NoAnswer as error:
            if self._server_answers:
                log.warning("Prometheus at %s is lost (%s); every source is scraped directly", self._server.url, error)
            self._server_answers = False
            return {}
        if not self._server_answers:
            log.info("Prometheus at %s is back; sources are read through it from the next slot on", self._server.url)
        self._server_answers = True
        return found

    def _take(self, found: Mapping[Place, tuple[Sample, ...]]) -> list[Endpoint]:
        """Take what is fresh; returns the sources of which the server has nothing fresh."""
        oldest_t = self._clock() - min(FRESH_S, self._stale_after_s() / 2)
        unread = []
        for endpoint, source in self._sources.items():
            samples = found.get((endpoint.instance, endpoint.name), ())
            if not samples or samples[-1].t < oldest_t:
                unread.append(endpoint)
                continue
            # Of a source that is known, everything since its last sample counts, not just since the server's one before.
            for sample in samples if source.sample is None else samples[-1:]:
                source.take(sample)
        return unread

    async def _read(self, endpoints: Sequence[Endpoint]) -> None:
        """Scrape all at once."""
        await asyncio.gather(*(self._read_one(endpoint) for endpoint in endpoints))

    async def _read_one(self, endpoint: Endpoint) -> None:
        sample = await self._scrape.read(endpoint.url)
        if sample is not None:
            self._sources[endpoint].take(sample)
