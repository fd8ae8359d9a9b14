"""The nouns of the orchestrator, as plain frozen data: what is there, what is seen, what is wanted, and the seams between.

Decision modules (`placement`, `scaling`, `runtimes.reconcile`, `costs`) are pure functions of these values. Every value
survives JSON exactly (`decision_log`), so that a logged run can be decided again. Units: seconds, bytes, cores, requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from models.manifest import Tier
from services.dataplane.routes import ReplicaState

Counts = Mapping[str, Mapping[str, int]]
"""service -> node -> replicas; a pair that is missing means 0."""


@dataclass(frozen=True, slots=True)
class Node:
    """An edge machine, or a share of one."""

    name: str
    cpus: float
    memory_bytes: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """A stage as deployed: what one replica needs and where it may run."""

    name: str
    tier: Tier
    cpus: float
    """Cores that a replica at work needs. A standby replica is idle and needs none until it is let out."""
    memory_bytes: int
    """Memory that a loaded replica holds, at work or not."""
    floor: int = 1
    """Ready replicas that no transition goes below (less only where fewer were ready to begin with)."""
    nodes: tuple[str, ...] = ()
    """Where it may run; empty: anywhere."""
    gpus: int = 0
    """GPUs that a loaded replica holds, at work or not."""


@dataclass(frozen=True, slots=True)
class Target:
    """How many replicas of a service are wanted in all."""

    replicas: int
    standby: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """x[s, n]: replicas of service s wanted on node n, at work and on standby."""

    ready: Counts = field(default_factory=dict)
    standby: Counts = field(default_factory=dict)
    allowance: Mapping[str, int] = field(default_factory=dict)
    """service -> standbys that the data plane may let out by itself until the next decision; none without an entry."""
    patience: Mapping[str, float] = field(default_factory=dict)
    """service -> share of a hop's slack that a wait may take before it does; `letting_out.SHARE` without an entry."""

    def ready_on(self, service: str, node: str) -> int:
        """Ready replicas wanted of a service on a node."""
        return self.ready.get(service, {}).get(node, 0)

    def standby_on(self, service: str, node: str) -> int:
        """Standby replicas wanted of a service on a node."""
        return self.standby.get(service, {}).get(node, 0)

    def target(self, service: str) -> Target:
        """Replicas of a service over all nodes."""
        return Target(sum(self.ready.get(service, {}).values()), sum(self.standby.get(service, {}).values()))

    def without(self, nodes: Collection[str]) -> Placement:
        """The placement with nothing on these nodes."""
        ready, standby = (
            {s: {n: count for n, count in row.items() if n not in nodes} for s, row in counts.items()}
            for counts in (self.ready, self.standby)
        )
        return replace(self, ready=ready, standby=standby)

    def with_let_out(self, counts: Counts) -> Placement:
        """The placement with so many replicas more at work, each in place of a standby as far as its node has one."""
        ready = {service: dict(nodes) for service, nodes in self.ready.items()}
        standby = {service: dict(nodes) for service, nodes in self.standby.items()}
        for service, nodes in counts.items():
            at_work, idle = ready.setdefault(service, {}), standby.setdefault(service, {})
            for node, n in nodes.items():
                at_work[node] = at_work.get(node, 0) + n
                idle[node] = max(0, idle.get(node, 0) - n)
        return replace(self, ready=ready, standby=standby)


@dataclass(frozen=True, slots=True)
class Replica:
    """One running copy of a service, as the runtime knows it."""

    id: str
    service: str
    node: str
    state: ReplicaState
    cpus: float
    memory_bytes: int
    url: str = ""
    outdated: bool = False
    """Started from an older specification, or before the operator asked for a restart: to be replaced."""
    gpus: int = 0
    let_out: bool = False
    """At work because the data plane let it out, and no decision has been made yet that knows of it."""


@dataclass(frozen=True, slots=True)
class Signal:
    """What the replicas of a service said of themselves; None where nothing was served, so nothing is known."""

    age_s: float
    """Age of the oldest sample among its routed replicas: a silent replica makes the whole signal old."""
    arrival_rate: float | None = None
    """lambda [req/s]: tasks that ended in the interval, dropped ones included, over its length."""
    queue_length: float | None = None
    """Q [requests], summed over replicas; a silent replica counts with its last value."""
    inflight: float | None = None
    wait_s: float | None = None
    """Mean time in queue of the interval [s]."""
    service_s: float | None = None
    """Mean compute time of the interval [s]: of the batch that a request was computed in."""
    service_cv2: float | None = None
    """Variance of that time over its mean squared."""
    batch_size: float | None = None
    """Mean number of requests computed together."""


@dataclass(frozen=True, slots=True)
class ServiceObservation:
    """A service at one instant."""

    replicas: Mapping[str, Mapping[ReplicaState, int]]
    """node -> state -> count."""
    signal: Signal | None = None
    """None: no replica has been sampled yet."""
    let_out: Mapping[str, int] = field(default_factory=dict)
    """node -> replicas at work that no decision asked for: standbys that the data plane has let out since the last one."""


@dataclass(frozen=True, slots=True)
class PipelineObservation:
    """How the tasks of a pipeline ended, at all gateways, since the observation before."""

    age_s: float
    interval_s: float
    outcomes: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Observation:
    """Everything a policy may look at. Time and the operator's wishes are data like the rest."""

    t: float
    """Seconds on the orchestrator's monotonic clock."""
    services: Mapping[str, ServiceObservation]
    pipelines: Mapping[str, PipelineObservation] = field(default_factory=dict)
    orders: Mapping[str, Target] = field(default_factory=dict)
    """Targets the operator set by hand; they outrank the testbed's."""

    def without(self, nodes: Collection[str]) -> Observation:
        """As if nothing were on these nodes, but for what it said of itself: replicas there are to be elsewhere."""
        services = {
            name: replace(
                seen,
                replicas={node: states for node, states in seen.replicas.items() if node not in nodes},
                let_out={node: n for node, n in seen.let_out.items() if node not in nodes},
            )
            for name, seen in self.services.items()
        }
        return replace(self, services=services)

    def standing_as(self, placement: Placement) -> Observation:
        """As if what ran were this placement: where a policy that begins anew is to begin."""
        names = {**placement.ready, **placement.standby}
        services = {
            name: ServiceObservation(
                {
                    node: {"ready": placement.ready_on(name, node), "standby": placement.standby_on(name, node)}
                    for node in {**placement.ready.get(name, {}), **placement.standby.get(name, {})}
                },
                self.services[name].signal if name in self.services else None,
            )
            for name in names
        }
        return replace(self, services={**self.services, **services})


@dataclass(frozen=True, slots=True)
class Decision:
    """A desired state, or a hold (`desired` is None): leave things as they are. Always with a reason."""

    desired: Placement | None
    reason: str


S = TypeVar("S")


class ScalingPolicy(Protocol[S]):
    """Decides once a slot, as a pure function: equal state and observation give an equal decision."""

    @property
    def state_type(self) -> type[S]:
        """For reading states back from the decision log."""

    def initial(self) -> S:
        """State before the first slot."""

    def step(self, state: S, observation: Observation) -> tuple[S, Decision]:
        """State after this slot, and what should run."""


class Telemetry(Protocol):
    """The edge that observes."""

    async def observe(self, t: float, replicas: Sequence[Replica]) -> Observation:
        """What is known at time t. A source that does not answer ages; it is never counted as zero."""


class Runtime(Protocol):
    """The edge that acts."""

    @property
    def starts(self) -> int:
        """Replicas started so far."""

    def replicas(self) -> tuple[Replica, ...]:
        """What runs now."""

    def apply(self, desired: Placement, seen: Sequence[Replica] = ()) -> None:
        """Make it the target and take the first steps towards it; the rest follows as replicas change state.

        Args:
            desired: the decision.
            seen: what ran, by `replicas`, when it was made. What has been let out since then stays at work.
        """
