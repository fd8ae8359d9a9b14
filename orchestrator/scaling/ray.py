"""Ray Serve's autoscaler: ongoing requests per replica, smoothed, acted on only after a delay.

    wanted = ceil(replicas + factor * (ongoing / target - replicas))

`replicas` are those that run, and `ongoing` is an average over the look-back period of what was reported by then. A wish must
point the same way from the target for `up_delay_s` (`down_delay_s`) without a break. Where the factor alone keeps a service
from shrinking, it shrinks by one. Defaults are those of AutoscalingConfig, with min_replicas 1.

Different here: a slot takes the place of the control loop's 0.1 s; requests are counted once a slot, where Ray samples them
every 0.5 s; and a stage holds its call open until the stages after it have answered, so that requests further down count as its
own. So they would in a Ray deployment that awaits another: the head of a chain gets more replicas than it needs.

Source: ray-project/ray of 2026, python/ray/serve: autoscaling_policy.py (delays by the clock, as since issue 62004), config.py,
_private/constants.py, _private/autoscaling_state.py; Ray Serve's documentation, Advanced Autoscaling.
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
    reported: float | None = None
    """When they were reported last [s]."""
    ongoing: float = 0.0
    """Their average then [requests]."""
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
    metrics_interval_s: float = 10.0
    """Between two reports to the controller [s]."""
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
        reported, ongoing = memory.reported, memory.ongoing
        if reported is None or seen.t - reported >= self.metrics_interval_s - 1e-9:
            reported, ongoing = seen.t, math.fsum(n for _, n in samples) / len(samples)
        wish = max(1, self.wish(ongoing, seen.ready))
        direction = (wish > seen.wanted) - (wish < seen.wanted)
        since = memory.since if direction == memory.direction else seen.t
        delay_s = self.up_delay_s if direction > 0 else self.down_delay_s
        if direction == 0 or seen.t - since < delay_s - 1e-9:
            return RayMemory(samples, reported, ongoing, direction, since), seen.wanted
        return RayMemory(samples, reported, ongoing), wish

    def wish(self, ongoing: float, replicas: int) -> int:
        """Replicas that so many ongoing requests ask for where so many run (at least one), before any delay."""
        needed = ongoing / self.ongoing
        factor = self.up_factor if needed > replicas else self.down_factor
        wish = math.ceil(replicas + factor * (needed - replicas) - 1e-9)
        stuck = wish == replicas and math.ceil(needed - 1e-9) < replicas
        return wish - 1 if stuck else wish
