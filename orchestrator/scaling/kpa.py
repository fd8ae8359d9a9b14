"""Knative's autoscaler: concurrency over a stable window, and over a short one in panic.

    wanted = ceil(mean concurrency / target), between ready / max_down_rate and ready * max_up_rate, every tick

Panic begins when the short window wants `panic_threshold` times what is ready, and ends more than a stable window after it
last did. While it lasts, the larger of both wishes counts and nothing is taken away. A service that is seen for the first time
with more than one replica begins in panic, so that a lack of history takes nothing away. Scaling to zero is off.

Defaults are those of config-autoscaler. Its target of 100 requests per replica is meant for revisions that bear any number at
once; for a stage that computes one batch at a time, its users would set `concurrency` (containerConcurrency) to what it bears.

Different here: concurrency is a gauge read once a slot, where Knative's proxies report its average over every second; and a
stage holds its call open until the stages after it have answered, so that requests further down count as its own. Knative's
proxies would count them too: the head of a chain gets more replicas than it needs.

Source: knative/serving 1.23 (98e5ef9, August 2026), pkg/autoscaler/scaling/autoscaler.go, pkg/autoscaler/aggregation,
config/core/configmaps/autoscaler.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from orchestrator.core import Decision, Observation, Placement
from orchestrator.scaling import autoscaler
from orchestrator.scaling.autoscaler import Seen
from orchestrator.scaling.site import Site


@dataclass(frozen=True, slots=True)
class KpaMemory:
    """Of one service."""

    looked: float | None = None
    """When it was decided last [s]."""
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
    concurrency: float = 100.0
    """Requests that a replica bears at once."""
    utilisation: float = 0.7
    """The share of it that is aimed at."""
    tick_s: float = 2.0
    """Between two looks [s]; a slot that comes sooner changes nothing."""
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
        samples = (*((t, c) for t, c in memory.samples if seen.t - t < self.stable_s - 1e-9), (seen.t, seen.ongoing))
        memory = replace(memory, samples=samples)
        if memory.looked is None and seen.ready > 1:
            memory = replace(memory, panic_since=seen.t, most=seen.ready)
        elif memory.looked is not None and seen.t - memory.looked < self.tick_s - 1e-9:
            return memory, seen.wanted
        recent = [c for t, c in samples if seen.t - t < self.panic_s - 1e-9]
        stable = math.fsum(c for _, c in samples) / len(samples)
        return self.scale(memory, seen.t, seen.ready, stable, math.fsum(recent) / len(recent))

    def scale(self, memory: KpaMemory, t: float, ready: int, stable: float, panic: float) -> tuple[KpaMemory, int]:
        """The decision of one tick.

        Args:
            memory: before it.
            t: now [s].
            ready: replicas at work.
            stable: mean concurrency of the stable window [requests].
            panic: mean concurrency of the short window [requests].

        Returns:
            What is remembered, and the replicas wanted; at least one.
        """
        there = max(1, ready)
        least, most = math.floor(there / self.max_down_rate), math.ceil(there * self.max_up_rate)
        target = self.concurrency * self.utilisation
        wished, rushed = (math.ceil(concurrency / target - 1e-9) for concurrency in (stable, panic))
        since = memory.panic_since
        if rushed / there >= self.panic_threshold:
            since = t
        elif since is not None and t - since > self.stable_s:
            since = None
        wanted = max(1, min(max(wished, least), most))
        if since is None:
            return KpaMemory(t, memory.samples), wanted
        wanted = max(wanted, min(max(rushed, least), most), memory.most)
        return KpaMemory(t, memory.samples, since, wanted), wanted
