"""Kubernetes' Horizontal Pod Autoscaler, and KEDA, which feeds it a queue's length.

    wanted = ceil(replicas * measured / target),  left alone while measured / target is within 1 +- tolerance

A proposal to shrink must have been the least for the whole stabilisation window; growth is limited per period to the larger of
so many pods and so many per cent. Defaults are those of autoscaling/v2. Source: the Kubernetes documentation, Horizontal Pod
Autoscaling, and of the API HPAScalingRules; KEDA's documentation, ScaledObject.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from orchestrator.core import Decision, Observation, Placement
from orchestrator.scaling import autoscaler
from orchestrator.scaling.autoscaler import Seen
from orchestrator.scaling.site import Site


@dataclass(frozen=True, slots=True)
class HpaMemory:
    """Of one service."""

    looked: float | None = None
    """When it was decided last [s]."""
    proposals: tuple[tuple[float, int], ...] = ()
    """(t, replicas) within the stabilisation window."""
    changes: tuple[tuple[float, int], ...] = ()
    """(t, replicas added or taken) within the period of the limits."""


@dataclass(frozen=True, slots=True)
class HpaState:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None
    services: Mapping[str, HpaMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Behavior:
    """How fast proposals may act."""

    sync_s: float = 15.0
    """Between two looks [s]; a slot that comes sooner changes nothing."""
    tolerance: float = 0.1
    down_window_s: float = 300.0
    """Stabilisation of shrinking [s]; growth has none."""
    period_s: float = 15.0
    """Of the limits on growth [s]. Shrinking by all of it in a period is allowed, so it has no limit."""
    up_pods: int = 4
    up_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Hpa:
    """By utilisation: the share of its time that a ready replica computes."""

    site: Site
    utilisation: float = 0.8
    behavior: Behavior = Behavior()
    state_type: ClassVar[type[HpaState]] = HpaState

    def initial(self) -> HpaState:
        """State before the first slot."""
        return HpaState()

    def step(self, state: HpaState, observation: Observation) -> tuple[HpaState, Decision]:
        """One slot; see `autoscaler`."""
        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, HpaMemory(), self._rule, observation
        )
        return HpaState(placement, services), decision

    def _rule(self, memory: HpaMemory, seen: Seen) -> tuple[HpaMemory, int]:
        """Replicas that are ordered and not ready yet are taken to idle when it grows, and left out when it shrinks."""
        busy = seen.busy
        if busy is None or seen.ready == 0:
            return memory, seen.wanted
        ratio = busy / (seen.ready * self.utilisation)
        counted = seen.ready
        if ratio > 1.0 and seen.wanted > seen.ready:
            counted = seen.wanted
            ratio = max(1.0, busy / (counted * self.utilisation))
        near = abs(ratio - 1.0) <= self.behavior.tolerance
        return _act(self.behavior, memory, seen, seen.wanted if near else math.ceil(ratio * counted - 1e-9))


@dataclass(frozen=True, slots=True)
class Keda:
    """By a queue's length, as an average per replica: tasks that wait or are at work, as a broker counts them.

    KEDA hands the HPA this metric. Its own cool-down only governs the step from one replica to none, which a floor of one
    excludes; above it, shrinking waits for the HPA's stabilisation.
    """

    site: Site
    queue_length: float = 5.0
    """Tasks per replica."""
    behavior: Behavior = Behavior()
    state_type: ClassVar[type[HpaState]] = HpaState

    def initial(self) -> HpaState:
        """State before the first slot."""
        return HpaState()

    def step(self, state: HpaState, observation: Observation) -> tuple[HpaState, Decision]:
        """One slot; see `autoscaler`."""
        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, HpaMemory(), self._rule, observation
        )
        return HpaState(placement, services), decision

    def _rule(self, memory: HpaMemory, seen: Seen) -> tuple[HpaMemory, int]:
        if seen.ongoing is None:
            return memory, seen.wanted
        ratio = seen.ongoing / (self.queue_length * seen.wanted)
        near = abs(ratio - 1.0) <= self.behavior.tolerance
        return _act(self.behavior, memory, seen, seen.wanted if near else math.ceil(seen.ongoing / self.queue_length))


def _act(behavior: Behavior, memory: HpaMemory, seen: Seen, proposal: int) -> tuple[HpaMemory, int]:
    """What of a proposal becomes of it: nothing between two looks; stabilised; limited."""
    if memory.looked is not None and seen.t - memory.looked < behavior.sync_s - 1e-9:
        return memory, seen.wanted
    if not memory.proposals:
        # As when the controller starts: what runs counts as proposed.
        memory = HpaMemory(memory.looked, ((seen.t, seen.wanted),), memory.changes)
    proposals = (*((t, n) for t, n in memory.proposals if seen.t - t < behavior.down_window_s), (seen.t, proposal))
    changes = tuple((t, n) for t, n in memory.changes if seen.t - t < behavior.period_s)
    replicas = max(n for _, n in proposals) if proposal < seen.wanted else proposal
    replicas = min(replicas, seen.wanted) if proposal < seen.wanted else replicas
    if replicas > seen.wanted:
        began = seen.wanted - sum(n for _, n in changes)
        replicas = max(seen.wanted, min(replicas, max(began + behavior.up_pods, math.ceil(began * (1.0 + behavior.up_share)))))
    if replicas != seen.wanted:
        changes = (*changes, (seen.t, replicas - seen.wanted))
    return HpaMemory(seen.t, proposals, changes), replicas
