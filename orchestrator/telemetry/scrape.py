"""Telemetry by direct scrape: reads the exposition endpoints of stages and gateways itself, with no Prometheus server.

Every source keeps its last sample and the growth up to it. A source that does not answer in time keeps both and ages; its
share of rates and queues stays what it was, and is never taken for zero.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from orchestrator.core import Observation, PipelineObservation, Replica, ServiceObservation, Signal
from orchestrator.telemetry import exposition
from orchestrator.telemetry.exposition import Growth, Sample
from services.dataplane.routes import ReplicaState

ANSWER_S = 0.4
"""Longest wait for one page [s]."""
SAMPLED_STATES: frozenset[ReplicaState] = frozenset({"ready", "standby", "draining"})


@dataclass(slots=True)
class Source:
    """One endpoint and what it said last."""

    first_asked: float
    sample: Sample | None = None
    growth: Growth = field(default_factory=Growth)

    def take(self, sample: Sample) -> None:
        """A new page has come."""
        if self.sample is not None:
            self.growth = exposition.growth(self.sample, sample)
        self.sample = sample

    def age_s(self, t: float) -> float:
        """Age of what is known; of one that never answered, since it was first asked."""
        return max(0.0, t - (self.sample.t if self.sample is not None else self.first_asked))


class Scrape:
    """See the module. `clock` is the one the runner takes t from."""

    def __init__(self, gateways: Callable[[], Sequence[str]], clock: Callable[[], float] = time.monotonic) -> None:
        self._gateways = gateways
        self._clock = clock
        self._sources: dict[str, Source] = {}
        self._client = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False)

    async def observe(self, t: float, replicas: Sequence[Replica]) -> Observation:
        """Ask every source at once; none is waited for longer than `ANSWER_S`."""
        gateways = list(self._gateways())
        sampled = [r for r in replicas if r.state in SAMPLED_STATES]
        urls = [*(r.url for r in sampled), *gateways]
        self._sources = {url: self._sources.get(url) or Source(t) for url in urls}
        await asyncio.gather(*(self._ask(url, source) for url, source in self._sources.items()))
        now = self._clock()
        services = {
            name: ServiceObservation(_placed(name, replicas), self._signal(name, sampled, now))
            for name in sorted({r.service for r in replicas})
        }
        return Observation(t, services, _pipelines([self._sources[url] for url in gateways], now))

    def ages_s(self) -> dict[str, float]:
        """Age of every source [s], by address."""
        now = self._clock()
        return {url: source.age_s(now) for url, source in self._sources.items()}

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, url: str, source: Source) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await self._client.get(f"{url}/metrics")
            answer.raise_for_status()
            source.take(exposition.parse(answer.text, self._clock()))
        except (TimeoutError, httpx.HTTPError, ValueError):
            # It ages, and the age is what the policy and the metrics go by.
            return

    def _signal(self, service: str, sampled: Sequence[Replica], now: float) -> Signal | None:
        ours = [(r, self._sources[r.url]) for r in sampled if r.service == service]
        spoke = [source for _, source in ours if source.sample is not None]
        if not spoke:
            return None
        routed = [source.age_s(now) for r, source in ours if r.state == "ready"]
        return Signal(
            age_s=max(routed or [source.age_s(now) for source in spoke]),
            arrival_rate=_rate(spoke),
            queue_length=_gauge(spoke, "stage_queue_length"),
            inflight=_gauge(spoke, "stage_inflight_requests"),
            wait_s=_mean(spoke, "stage_queue_duration_seconds"),
            service_s=_mean(spoke, "stage_compute_duration_seconds"),
        )


def _placed(service: str, replicas: Sequence[Replica]) -> dict[str, dict[ReplicaState, int]]:
    counts: dict[str, dict[ReplicaState, int]] = {}
    for replica in replicas:
        if replica.service == service:
            states = counts.setdefault(replica.node, {})
            states[replica.state] = states.get(replica.state, 0) + 1
    return counts


def _rate(sources: Sequence[Source]) -> float | None:
    """Sum of the rates, each over its own interval; None before any source has two samples."""
    known = [s.growth for s in sources if s.growth.interval_s > 0]
    return sum(growth.sum("stage_requests_total") / growth.interval_s for growth in known) if known else None


def _gauge(sources: Sequence[Source], name: str) -> float:
    return sum(exposition.gauge(source.sample, name) for source in sources if source.sample is not None)


def _mean(sources: Sequence[Source], histogram: str) -> float | None:
    """Mean of what was observed in the last interval; None where nothing was."""
    count = sum(source.growth.sum(f"{histogram}_count") for source in sources)
    return sum(source.growth.sum(f"{histogram}_sum") for source in sources) / count if count else None


def _pipelines(gateways: Sequence[Source], now: float) -> dict[str, PipelineObservation]:
    outcomes: dict[str, dict[str, float]] = {}
    for gateway in gateways:
        for labels, value in gateway.growth.by_labels("requests_total").items():
            named = dict(labels)
            of_pipeline = outcomes.setdefault(named.get("pipeline", ""), {})
            of_pipeline[named.get("outcome", "")] = of_pipeline.get(named.get("outcome", ""), 0.0) + value
    age_s = max((gateway.age_s(now) for gateway in gateways), default=0.0)
    interval_s = max((gateway.growth.interval_s for gateway in gateways), default=0.0)
    return {name: PipelineObservation(age_s, interval_s, counts) for name, counts in sorted(outcomes.items())}
