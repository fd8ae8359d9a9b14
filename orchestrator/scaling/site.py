"""What there is to scale, and on what: the parameters that all policies but the manual one share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.core import Node, Service, Target
from orchestrator.costs import Prices
from orchestrator.scaling.parameters import Ordered, Table


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


@dataclass(frozen=True, slots=True)
class Site:
    """See the module."""

    services: tuple[Service, ...]
    nodes: tuple[Node, ...]
    targets: Mapping[str, Target]
    """Where every service begins; where core services stay."""
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
