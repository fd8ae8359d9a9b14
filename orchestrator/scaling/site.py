"""What there is to scale, and on what: what every policy is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from models.manifest import ServiceLaw
from orchestrator.core import Counts, Node, Service, Target
from orchestrator.costs import Prices
from orchestrator.scaling.parameters import Ordered, Table
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Link


@dataclass(frozen=True, slots=True)
class Law:
    """What is known of a service before it is measured: from its model's profile."""

    mean_s: float
    """Mean time to compute a request that is alone [s]."""
    cv2: float = 0.0
    """Variance of that time over its mean squared."""
    per_request_s: float | None = None
    """Time that a request takes of a replica when batches are full [s]; None: as when it is alone."""
    start_s: float = 1.0
    """From the decision to start a replica until it is on standby [s]."""
    max_batch: int = 1
    """Requests that are computed together at most."""
    slots: int = 1
    """Batches that a replica computes at once."""

    def batch_s(self, batch: float) -> float:
        """Mean time T(b) of a batch [s]: a straight line from one request to full batches."""
        if self.max_batch <= 1 or self.per_request_s is None:
            return self.mean_s * batch
        full_s = max(self.mean_s, self.per_request_s * self.max_batch * self.slots)
        return self.mean_s + (batch - 1.0) * (full_s - self.mean_s) / (self.max_batch - 1)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a pipeline promises, and which way its tasks go."""

    deadline_s: float
    epsilon: float
    """Share of its tasks that may be late."""
    paths: tuple[tuple[str, ...], ...]
    """The services of every way from a first step to the last, in order."""
    fixed_s: tuple[float, ...] = ()
    """Time on each of these ways that is neither wait nor compute: links and hops [s]. Empty: none."""
    visits: Mapping[str, int] = field(default_factory=dict)
    """Requests that a task makes of each service; a service on the paths without an entry: one."""

    def visits_of(self, service: str) -> int:
        """Requests that a task makes of a service."""
        if service in self.visits:
            return self.visits[service]
        return int(any(service in path for path in self.paths))

    @property
    def services(self) -> tuple[str, ...]:
        """The services on its paths, in the order of their first appearance."""
        return tuple(dict.fromkeys(service for path in self.paths for service in path))


@dataclass(frozen=True, slots=True)
class Site:
    """See the module."""

    services: tuple[Service, ...]
    nodes: tuple[Node, ...]
    targets: Mapping[str, Target]
    """Where every service begins; where core services stay."""
    placed: Counts = field(default_factory=dict)
    """Where the replicas of core services are to run; those without an entry go where `autoscaler.place` finds room."""
    flows: Ordered[tuple[str, str]] = frozenset()
    latencies_s: Table[tuple[str, str], float] | None = None
    stale_after_s: float = 5.0
    """A signal older than this says nothing [s]."""
    most: Mapping[str, int] = field(default_factory=dict)
    """Replicas a service may have at most; without an entry, what fits."""
    laws: Mapping[str, Law] = field(default_factory=dict)
    """Without an entry: nothing is known of the service until it has been measured."""
    promises: Mapping[str, Promise] = field(default_factory=dict)
    """By pipeline."""
    prices: Prices = field(default_factory=Prices)
    slot_s: float = 1.0
    """Time between two decisions [s]."""


def law(line: ServiceLaw, units: float, *, cv2: float, max_batch: int, slots: int, start_s: float) -> Law:
    """What a profile says of a service.

    Args:
        line: service time of a batch by its size.
        units: size of one request of the usual lengths.
        cv2: of the service time.
        max_batch: requests that are computed together at most.
        slots: batches that a replica computes at once.
        start_s: until a replica that is started is on standby [s].
    """
    full_s = line.mean_s(units * max_batch) / max_batch / slots
    return Law(line.mean_s(units), cv2, full_s, start_s, max_batch, slots)


def link_s(here: Sequence[str], there: Sequence[str], links: Mapping[tuple[str, str], Link], size_bytes: float = 0.0) -> float:
    """Time on the link, there with so many bytes and back with few, between two replicas that may be on any of these nodes [s].

    The mean over all pairs; a pair without a link, and a node to itself, is at no distance.
    """
    sources, targets = frozenset(here), frozenset(there)
    found = [link for (a, b), link in links.items() if a in sources and b in targets]
    total = math.fsum(2.0 * link.latency_s + size_bytes / link.bandwidth_bytes_per_s for link in found)
    return total / max(1, len(sources) * len(targets))


def hop_times(
    gateways: Sequence[str],
    homes: Mapping[str, Sequence[str]],
    links: Mapping[tuple[str, str], Link],
    sizes: Mapping[str, float],
    hop_s: float,
) -> Callable[[str, str | None], float]:
    """What `promise` asks for.

    Args:
        gateways: their nodes.
        homes: service -> nodes it may run on.
        links: between nodes.
        sizes: service -> bytes of a request's inputs.
        hop_s: of every hop beside its link [s].
    """
    known: dict[tuple[str, str | None], float] = {}

    def found(service: str, before: str | None) -> float:
        if (service, before) not in known:
            here = gateways if before is None else homes[before]
            known[service, before] = hop_s + link_s(here, homes[service], links, sizes[service])
        return known[service, before]

    return found


def promise(pipeline: Pipeline, hop_s: Callable[[str, str | None], float]) -> Promise:
    """What a pipeline promises.

    Args:
        pipeline: its DAG; every way through it becomes a path. Ways through the same services become one, the slowest.
        hop_s: (service, the service before it on the way, or None for the gateway) -> time that is neither wait nor
            compute, there and back [s].
    """
    steps = {step.id: step for step in pipeline.steps}
    needed = {parent for step in pipeline.steps for parent in step.parents}
    slowest: dict[tuple[str, ...], float] = {}
    for step in pipeline.steps:
        if step.id in needed:
            continue
        for way in _ways(step, steps):
            hops = zip(way, (None, *way), strict=False)
            total = sum(hop_s(service, before) for service, before in hops)
            slowest[way] = max(total, slowest.get(way, 0.0))
    visits: dict[str, int] = {}
    for step in pipeline.steps:
        visits[step.service] = visits.get(step.service, 0) + 1
    return Promise(pipeline.deadline_s, pipeline.epsilon, tuple(slowest), tuple(slowest.values()), visits)


def _ways(last: Step, steps: Mapping[str, Step]) -> list[tuple[str, ...]]:
    """The services of every way to this step."""
    if not last.parents:
        return [(last.service,)]
    return [(*way, last.service) for parent in sorted(last.parents) for way in _ways(steps[parent], steps)]
