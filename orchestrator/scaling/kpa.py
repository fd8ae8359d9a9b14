"""Knative's autoscaler: concurrency over a stable window, and over a short one in panic.

    wanted = ceil(mean concurrency / target), between ready / max_down_rate and ready * max_up_rate

Panic begins when the short window wants `panic_threshold` times what is ready, and ends a stable window after it last did.
While it lasts, the larger of both wishes counts and nothing is taken away. Defaults are those of config-autoscaler, but for the
concurrency that one replica bears. Source: Knative Serving's documentation of the KPA, and its pkg/autoscaler/scaling.
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
class KpaMemory:
    """Of one service."""

    samples: tuple[tuple[float, float], ...] = ()
    """(t, concurrency) within the stable window."""
    panic_since: float | None = None
    """When the short window asked for panic last [s]; None out of panic."""
    most: int = 0
    """The largest wish of this panic."""


@dataclass(frozen=True, slots=True)
class KpaState:
    """What the policy carries from slot to slot."""

    placement: Placement | None = None
    services: Mapping[str, KpaMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kpa:
    """Parameters of the policy."""

    site: Site
    concurrency: float = 1.0
    """Requests that a replica bears at once."""
    utilisation: float = 0.7
    """The share of it that is aimed at."""
    stable_s: float = 60.0
    panic_s: float = 6.0
    panic_threshold: float = 2.0
    max_up_rate: float = 1000.0
    max_down_rate: float = 2.0
    state_type: ClassVar[type[KpaState]] = KpaState

    def initial(self) -> KpaState:
        """State before the first slot."""
        return KpaState()

    def step(self, state: KpaState, observation: Observation) -> tuple[KpaState, Decision]:
        """One slot; see `autoscaler`."""
        placement, services, decision = autoscaler.step(
            self.site, state.placement, state.services, KpaMemory(), self._rule, observation
        )
        return KpaState(placement, services), decision

    def _rule(self, memory: KpaMemory, seen: Seen) -> tuple[KpaMemory, int]:
        if seen.ongoing is None:
            return memory, seen.wanted
        samples = (*((t, c) for t, c in memory.samples if seen.t - t < self.stable_s), (seen.t, seen.ongoing))
        ready = max(1, seen.ready)
        least, most = math.floor(ready / self.max_down_rate), math.ceil(ready * self.max_up_rate)
        target = self.concurrency * self.utilisation

        def wish(window_s: float) -> int:
            inside = [c for t, c in samples if seen.t - t < window_s]
            return math.ceil(math.fsum(inside) / len(inside) / target - 1e-9)

        stable, panic = wish(self.stable_s), wish(self.panic_s)
        since = memory.panic_since
        if panic / ready >= self.panic_threshold:
            since = seen.t
        elif since is not None and seen.t - since > self.stable_s:
            since = None
        wanted = min(max(stable, least), most)
        if since is None:
            return KpaMemory(samples), wanted
        wanted = max(wanted, min(max(panic, least), most), memory.most)
        return KpaMemory(samples, since, wanted), wanted
