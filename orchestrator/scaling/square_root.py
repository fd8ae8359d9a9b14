"""Two policies that know no feedback: what the testbed says, and square-root staffing of a fast estimate of the load.

    n = ceil(r + beta sqrt(r)),  r = lambda m;  given up only after it was too much for `hold_s`

Arrivals are what ended plus what the backlog grew by, so that a queue that falls behind is not taken for a small load.
Source: Halfin and Whitt 1981; the estimator is `estimators.track`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from orchestrator.core import Decision, Observation, Placement
from orchestrator.scaling import autoscaler, estimators, queueing
from orchestrator.scaling.autoscaler import Seen
from orchestrator.scaling.estimators import RateState
from orchestrator.scaling.site import Site


@dataclass(frozen=True, slots=True)
class LoadMemory:
    """Of one service."""

    t: float | None = None
    """When it was seen last [s]."""
    queue: float = 0.0
    """Tasks that waited then."""
    rate: RateState = field(default_factory=RateState)
    service_s: float | None = None
    """m, an exponentially weighted mean [s]."""
    wishes: tuple[tuple[float, int], ...] = ()
    """(t, replicas) within the hold."""


@dataclass(frozen=True, slots=True)
class LoadState:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None
    services: Mapping[str, LoadMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Static:
    """As many replicas as the testbed asks for, whatever comes."""

    site: Site
    state_type: ClassVar[type[LoadState]] = LoadState

    def initial(self) -> LoadState:
        """State before the first slot."""
        return LoadState()

    def step(self, state: LoadState, observation: Observation) -> tuple[LoadState, Decision]:
        """One slot; see `autoscaler`."""
        targets = {name: target for name, target in self.site.targets.items() if name not in observation.orders}
        fixed = Observation(observation.t, observation.services, observation.pipelines, {**targets, **observation.orders})
        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, LoadMemory(), lambda memory, seen: (memory, seen.wanted), fixed
        )
        return LoadState(placement, services), decision


@dataclass(frozen=True, slots=True)
class SquareRoot:
    """Parameters of the policy."""

    site: Site
    beta: float = 1.5
    """Safety; `queueing.halfin_whitt_beta` gives it for a probability to wait."""
    memory_s: float = 2.0
    """Time constant of the estimate of the rate [s]; that of the service time is ten times as long."""
    hold_s: float = 5.0
    state_type: ClassVar[type[LoadState]] = LoadState

    def initial(self) -> LoadState:
        """State before the first slot."""
        return LoadState()

    def step(self, state: LoadState, observation: Observation) -> tuple[LoadState, Decision]:
        """One slot; see `autoscaler`."""
        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, LoadMemory(), self._rule, observation
        )
        return LoadState(placement, services), decision

    def _rule(self, memory: LoadMemory, seen: Seen) -> tuple[LoadMemory, int]:
        ended, queue = seen.signal.arrival_rate, seen.signal.queue_length
        if ended is None or queue is None:
            return memory, seen.wanted
        if memory.t is None or seen.t <= memory.t:
            return LoadMemory(seen.t, queue, memory.rate, memory.service_s, memory.wishes), seen.wanted
        elapsed_s = seen.t - memory.t
        came = max(0.0, ended + (queue - memory.queue) / elapsed_s)
        rate = estimators.track(memory.rate, came, elapsed_s, self.memory_s)
        service_s = _mean(memory.service_s, seen.signal.service_s, elapsed_s / (10.0 * self.memory_s))
        if service_s is None or rate.rate is None:
            return LoadMemory(seen.t, queue, rate, service_s, memory.wishes), seen.wanted
        wish = queueing.square_root_staffing(rate.rate * service_s, self.beta)
        wishes = (*((t, n) for t, n in memory.wishes if seen.t - t < self.hold_s), (seen.t, wish))
        return LoadMemory(seen.t, queue, rate, service_s, wishes), max(n for _, n in wishes)


def _mean(mean: float | None, measured: float | None, weight: float) -> float | None:
    if mean is None or measured is None:
        return measured if mean is None else mean
    return mean + min(1.0, weight) * (measured - mean)
