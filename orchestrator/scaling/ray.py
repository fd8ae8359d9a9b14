"""Ray Serve's autoscaler: ongoing requests per replica, smoothed, acted on only after a delay.

    wanted = ceil(replicas * (1 + factor * (ongoing / (target * replicas) - 1)))

A wish must point the same way for `up_delay_s` (`down_delay_s`) without a break. Where smoothing alone keeps a service from
shrinking, it shrinks by one. Defaults are those of AutoscalingConfig. Source: Ray Serve's documentation, Advanced Autoscaling.
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
class RayMemory:
    """Of one service."""

    samples: tuple[tuple[float, float], ...] = ()
    """(t, ongoing requests) within the look-back period."""
    direction: int = 0
    """Of the wishes since `since`: 1 up, -1 down."""
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class RayState:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None
    services: Mapping[str, RayMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ray:
    """Parameters of the policy."""

    site: Site
    ongoing: float = 2.0
    """Requests per replica that are aimed at, waiting ones included."""
    up_factor: float = 1.0
    down_factor: float = 1.0
    up_delay_s: float = 30.0
    down_delay_s: float = 600.0
    look_back_s: float = 30.0
    state_type: ClassVar[type[RayState]] = RayState

    def initial(self) -> RayState:
        """State before the first slot."""
        return RayState()

    def step(self, state: RayState, observation: Observation) -> tuple[RayState, Decision]:
        """One slot; see `autoscaler`."""
        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, RayMemory(), self._rule, observation
        )
        return RayState(placement, services), decision

    def _rule(self, memory: RayMemory, seen: Seen) -> tuple[RayMemory, int]:
        if seen.ongoing is None or seen.ready == 0:
            return memory, seen.wanted
        samples = (*((t, n) for t, n in memory.samples if seen.t - t < self.look_back_s), (seen.t, seen.ongoing))
        wish = self._wish(math.fsum(n for _, n in samples) / len(samples), seen.ready)
        direction = (wish > seen.wanted) - (wish < seen.wanted)
        since = memory.since if direction == memory.direction else seen.t
        delay_s = self.up_delay_s if direction > 0 else self.down_delay_s
        if direction == 0 or seen.t - since < delay_s - 1e-9:
            return RayMemory(samples, direction, since), seen.wanted
        return RayMemory(samples), wish

    def _wish(self, ongoing: float, replicas: int) -> int:
        ratio = ongoing / (self.ongoing * replicas)
        factor = self.up_factor if ratio >= 1.0 else self.down_factor
        wish = math.ceil(replicas * (1.0 + factor * (ratio - 1.0)) - 1e-9)
        stuck = wish == replicas and math.ceil(replicas * ratio - 1e-9) < replicas
        return wish - 1 if stuck else wish
