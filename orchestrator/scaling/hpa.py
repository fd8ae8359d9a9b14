"""Kubernetes' Horizontal Pod Autoscaler, and KEDA, which feeds it a queue's length.

    wanted = ceil(replicas * measured / target),  left alone while measured / target is within 1 +- tolerance

A proposal to shrink must have been the least for the whole stabilisation window; growth is limited per period to the larger of
so many pods and so many per cent. Pods that are not ready are taken to idle where it would grow, and left out where it would
shrink; where that turns the direction round, nothing changes. Defaults are those of autoscaling/v2 and of the controller
manager. A service's floor stands for `minReplicas`; the step to none is not taken.

More favourable here than there: utilisation is that of the last slot, where a metrics server averages over its own window of
15 s and more. Less favourable: a stage holds its call open until the stages after it have answered, and those requests count
as its own, so that KEDA gives the head of a chain more than it needs, as it would with any count of requests in flight.

Sources: Kubernetes documentation, Horizontal Pod Autoscaling (v1.33); kubernetes/kubernetes, pkg/controller/podautoscaler
(horizontal.go, replica_calculator.go) and pkg/apis/autoscaling/v2/defaults.go; KEDA 2.22 documentation, ScaledObject and AWS
SQS.
"""

from __future__ import annotations

import math
from abc import abstractmethod
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
class _Horizontal:
    """What the HPA does with any metric."""

    site: Site
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
        if memory.looked is not None and seen.t - memory.looked < self.behavior.sync_s - 1e-9:
            return memory, seen.wanted
        proposal = self._proposal(seen)
        return (memory, seen.wanted) if proposal is None else _act(self.behavior, memory, seen, max(1, proposal))

    def _near(self, ratio: float) -> bool:
        return abs(ratio - 1.0) <= self.behavior.tolerance + 1e-9

    @abstractmethod
    def _proposal(self, seen: Seen) -> int | None:
        """What the metric asks for; None where there is none."""


@dataclass(frozen=True, slots=True)
class Hpa(_Horizontal):
    """By utilisation: the share of its time that a ready replica computes."""

    utilisation: float = 0.8

    def _proposal(self, seen: Seen) -> int | None:
        busy = seen.busy
        if busy is None or seen.ready == 0:
            return None
        ratio, counted = busy / (seen.ready * self.utilisation), seen.ready
        if ratio > 1.0 and seen.wanted > seen.ready:
            counted = seen.wanted
            ratio = max(1.0, busy / (counted * self.utilisation))
        return seen.wanted if self._near(ratio) else math.ceil(ratio * counted - 1e-9)


@dataclass(frozen=True, slots=True)
class Keda(_Horizontal):
    """By a queue's length, as an average per replica: tasks that wait or are at work, as KEDA counts those of an SQS queue.

    KEDA hands the HPA an external metric with an average value, whose ratio is taken over all pods there are, ready or not. The
    HPA asks for it at every sync; KEDA's own polling (30 s), activation and cool-down (300 s) only govern the step between no
    replica and one.
    """

    queue_length: float = 5.0
    """Tasks per replica: the default of KEDA's SQS scaler."""

    def _proposal(self, seen: Seen) -> int | None:
        if seen.ongoing is None:
            return None
        needed = seen.ongoing / self.queue_length
        return seen.wanted if seen.wanted and self._near(needed / seen.wanted) else math.ceil(needed - 1e-9)


def _act(behavior: Behavior, memory: HpaMemory, seen: Seen, proposal: int) -> tuple[HpaMemory, int]:
    """What of a proposal becomes of it: stabilised, then limited."""
    # As when the controller starts: what runs counts as proposed.
    past = memory.proposals or ((seen.t, seen.wanted),)
    proposals = (*((t, n) for t, n in past if seen.t - t < behavior.down_window_s), (seen.t, proposal))
    changes = tuple((t, n) for t, n in memory.changes if seen.t - t < behavior.period_s - 1e-9)
    if proposal <= seen.wanted:
        replicas = min(seen.wanted, max(n for _, n in proposals))
    else:
        began = seen.wanted - sum(n for _, n in changes)
        limit = max(began + behavior.up_pods, math.ceil(began * (1.0 + behavior.up_share) - 1e-9))
        replicas = max(seen.wanted, min(proposal, limit))
    if replicas != seen.wanted:
        changes = (*changes, (seen.t, replicas - seen.wanted))
    return HpaMemory(seen.t, proposals, changes), replicas
