"""What is known of every source, and the observation that this makes: pure, and the same whoever read the samples.

A source is a replica or a gateway. It keeps its last sample and the growth up to it. One that is not heard keeps both and
ages; its share of rates and queues stays what it was, and is never taken for zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from orchestrator.core import Observation, PipelineObservation, Replica, ServiceObservation, Signal
from orchestrator.telemetry import exposition
from orchestrator.telemetry.exposition import Growth, Sample
from services.dataplane.routes import ReplicaState

COMPUTE, SQUARES, BATCHES = "stage_compute_duration_seconds", "stage_compute_seconds_squared_total", "stage_batch_size_count"
SAMPLED_STATES: frozenset[ReplicaState] = frozenset({"ready", "standby", "draining"})
MIN_INTERVAL_S = 0.02
"""Two samples closer than this tell nothing about a rate; they may even be one, read twice by clocks that drift [s]."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Who exposes metrics, and where. A name is never used for two replicas; an address may be."""

    name: str
    url: str

    @property
    def instance(self) -> str:
        """HOST:PORT, as in the label `instance` of a Prometheus server."""
        parts = urlsplit(self.url)
        return parts.netloc if parts.port is not None else f"{parts.netloc}:80"


@dataclass(slots=True)
class Source:
    """One endpoint and what it said last."""

    first_asked: float
    sample: Sample | None = None
    growth: Growth = field(default_factory=Growth)
    """Over the last interval that is known: for rates and means."""
    news: Growth = field(default_factory=Growth)
    """What came in this slot: for counting every task once."""

    def begin(self) -> None:
        """A slot begins: nothing new is known yet."""
        self.news = Growth()

    def take(self, sample: Sample) -> None:
        """A sample has come; one that is no newer than the last is passed over."""
        if self.sample is not None:
            if sample.t - self.sample.t < MIN_INTERVAL_S:
                return
            self.growth = self.news = exposition.growth(self.sample, sample)
        self.sample = sample

    def age_s(self, t: float) -> float:
        """Age of what is known; of one that never answered, since it was first asked."""
        return max(0.0, t - (self.sample.t if self.sample is not None else self.first_asked))


def sampled(replicas: Sequence[Replica]) -> list[Endpoint]:
    """The replicas that have something to say."""
    return [_endpoint(replica) for replica in replicas if replica.state in SAMPLED_STATES]


def observe(
    t: float, now: float, replicas: Sequence[Replica], gateways: Sequence[Endpoint], sources: Mapping[Endpoint, Source]
) -> Observation:
    """The observation of the slot that began at t, from what is known now.

    Args:
        t: begin of the slot [s].
        now: the instant ages are taken at [s].
        replicas: what runs.
        gateways: the gateways among the sources.
        sources: all that `sampled(replicas)` and `gateways` name.
    """
    services = {
        name: ServiceObservation(
            _placed(name, replicas),
            _signal(name, replicas, sources, now),
            Counter(replica.node for replica in replicas if replica.service == name and replica.let_out),
        )
        for name in sorted({replica.service for replica in replicas})
    }
    return Observation(t, services, _pipelines([sources[gateway] for gateway in gateways], now))


def _endpoint(replica: Replica) -> Endpoint:
    return Endpoint(replica.id, replica.url)


def _signal(service: str, replicas: Sequence[Replica], sources: Mapping[Endpoint, Source], now: float) -> Signal | None:
    ours = [(r, sources[_endpoint(r)]) for r in replicas if r.service == service and r.state in SAMPLED_STATES]
    spoke = [source for _, source in ours if source.sample is not None]
    if not spoke:
        return None
    routed = [source.age_s(now) for replica, source in ours if replica.state == "ready"]
    return Signal(
        age_s=max(routed or [source.age_s(now) for source in spoke]),
        arrival_rate=_rate(spoke),
        queue_length=_gauge(spoke, "stage_queue_length"),
        inflight=_gauge(spoke, "stage_inflight_requests"),
        wait_s=_mean(spoke, "stage_queue_duration_seconds"),
        service_s=_mean(spoke, COMPUTE),
        service_cv2=_cv2(spoke),
        batch_size=_batch_size(spoke),
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


def _cv2(sources: Sequence[Source]) -> float | None:
    """Squared coefficient of variation of the compute times of the last interval, E[s^2] / E[s]^2 - 1; None where unknown."""
    telling = [source for source in sources if source.growth.has(SQUARES)]
    mean_s, squares = _mean(telling, COMPUTE), sum(source.growth.sum(SQUARES) for source in telling)
    if not mean_s:
        return None
    count = sum(source.growth.sum(f"{COMPUTE}_count") for source in telling)
    return max(0.0, squares / count / mean_s**2 - 1.0)


def _batch_size(sources: Sequence[Source]) -> float | None:
    """Mean number of requests computed together in the last interval; None where nothing was, or where it is not told."""
    batches = sum(source.growth.sum(BATCHES) for source in sources)
    requests = sum(source.growth.sum(f"{COMPUTE}_count") for source in sources if source.growth.has(BATCHES))
    # A batch is counted a moment before its requests, and an interval may end between the two.
    return max(1.0, requests / batches) if batches else None


def _pipelines(gateways: Sequence[Source], now: float) -> dict[str, PipelineObservation]:
    """Every task in one observation only: a gateway of which nothing new is known adds nothing, and its age tells so."""
    samples = [gateway.sample for gateway in gateways if gateway.sample is not None]
    outcomes: dict[str, dict[str, float]] = {
        dict(labels).get("pipeline", ""): {} for sample in samples for name, labels in sample.values if name == "requests_total"
    }
    for gateway in gateways:
        for labels, value in gateway.news.by_labels("requests_total").items():
            named = dict(labels)
            of_pipeline, outcome = outcomes[named.get("pipeline", "")], named.get("outcome", "")
            of_pipeline[outcome] = of_pipeline.get(outcome, 0.0) + value
    age_s = max((gateway.age_s(now) for gateway in gateways), default=0.0)
    interval_s = max((gateway.news.interval_s for gateway in gateways), default=0.0)
    return {name: PipelineObservation(age_s, interval_s, counts) for name, counts in sorted(outcomes.items())}
