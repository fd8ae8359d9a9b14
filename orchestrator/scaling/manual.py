"""The policy of a testbed scaled by hand: the testbed's targets, or the operator's where there are any.

What runs stays where it is; a changed target moves only the difference. Nothing is taken away from a service whose signal is
stale: what looks idle may just be silent.

Standbys are there to be used: the data plane may let out all of them. One that it has let out is kept at work as long as the
service has a queue, and a while longer; then it is a standby again. Nothing is started in its place meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from orchestrator.core import Decision, Observation, Placement, ServiceObservation, Target
from orchestrator.errors import Infeasible
from orchestrator.placement import greedy
from orchestrator.scaling.site import Site


@dataclass(frozen=True, slots=True)
class LetOut:
    """The standbys of a service that are at work."""

    nodes: Mapping[str, int]
    needed: float
    """Begin of the last slot in which one was let out, or the service had a queue [s]."""


@dataclass(frozen=True, slots=True)
class ManualState:
    """What was ordered last, and what the data plane has let out."""

    placement: Placement | None = None
    """What the targets want; None before the first slot, which starts from what runs."""
    let_out: Mapping[str, LetOut] = field(default_factory=dict)
    """By service."""


@dataclass(frozen=True, slots=True)
class Manual:
    """Parameters of the policy. A policy is its configuration."""

    site: Site
    hold_s: float = 5.0
    """How long a standby that was let out stays at work when it is needed no more [s]."""
    state_type: ClassVar[type[ManualState]] = ManualState

    def initial(self) -> ManualState:
        """State before the first slot."""
        return ManualState()

    def step(self, state: ManualState, observation: Observation) -> tuple[ManualState, Decision]:
        """Place what the operator and the testbed want; see the module."""
        current = state.placement or running(observation)
        wanted = self.wanted(observation.orders)
        held = {name: age for name in wanted if (age := self._held(name, wanted[name], current, observation)) is not None}
        targets = {name: current.target(name) if name in held else target for name, target in wanted.items()}
        if state.placement is not None and all(current.target(name) == target for name, target in targets.items()):
            outs = {name: self._let_out(name, current, state.let_out.get(name), observation) for name in wanted}
            let_out = {name: out for name, out in outs.items() if out is not None}
            reason = _reason(f"as ordered: {_totals(targets)}{_told(let_out)}", held)
            return ManualState(current, let_out), Decision(_at_work(current, let_out), reason)
        try:
            placement = self.place(targets, current)
        except Infeasible as error:
            return state, Decision(None, f"hold: {error}")
        # Whatever was let out for the old order is a standby again; a burst that lasts lets it out anew.
        return ManualState(placement), Decision(_at_work(placement, {}), _reason(f"new order: {_totals(targets)}", held))

    def wanted(self, orders: Mapping[str, Target]) -> dict[str, Target]:
        """The targets in force: the operator's where there is one, else the testbed's."""
        return {name: orders.get(name, target) for name, target in self.site.targets.items()}

    def place(self, targets: Mapping[str, Target], current: Placement | None) -> Placement:
        """Nodes for these targets.

        Raises:
            Infeasible: they do not fit.
        """
        site = self.site
        return greedy.place(site.services, site.nodes, targets, flows=site.flows, latencies_s=site.latencies_s, keep=current)

    def _let_out(self, name: str, current: Placement, before: LetOut | None, observation: Observation) -> LetOut | None:
        """The service's standbys that are to be at work until the next slot; None where there are none."""
        seen = observation.services.get(name)
        if seen is None or not (seen.let_out or before):
            return None
        known, needed = (before.nodes, before.needed) if before is not None else ({}, observation.t)
        # A service that is silent may have a queue.
        busy = seen.signal is not None and (bool(seen.signal.queue_length) or seen.signal.age_s > self.site.stale_after_s)
        if seen.let_out or busy:
            needed = observation.t
        if observation.t - needed >= self.hold_s:
            return None
        nodes = {
            node: out
            for node, standby in current.standby.get(name, {}).items()
            if (out := min(standby, known.get(node, 0) + seen.let_out.get(node, 0)))
        }
        return LetOut(nodes, needed) if nodes else None

    def _held(self, name: str, target: Target, current: Placement, observation: Observation) -> float | None:
        """Age [s] of the stale signal that forbids the order, or None where nothing does."""
        if target.replicas >= current.target(name).replicas:
            return None
        seen = observation.services.get(name)
        if seen is None or seen.signal is None or seen.signal.age_s <= self.site.stale_after_s:
            return None
        return seen.signal.age_s


def _at_work(placement: Placement, let_out: Mapping[str, LetOut]) -> Placement:
    """The placement with these standbys at work, and the others left to the data plane."""
    desired = placement.with_let_out({name: out.nodes for name, out in let_out.items()}) if let_out else placement
    allowance = {name: left for name, nodes in desired.standby.items() if (left := sum(nodes.values()))}
    return replace(desired, allowance=allowance)


def running(observation: Observation) -> Placement:
    """What runs, as a placement: replicas that still load count as standby, those that drain not at all."""
    ready = {name: _count(service, ("ready",)) for name, service in observation.services.items()}
    idle = {name: _count(service, ("standby", "starting")) for name, service in observation.services.items()}
    return Placement(ready, idle)


def _count(service: ServiceObservation, states: tuple[str, ...]) -> dict[str, int]:
    sums = {node: sum(n for state, n in counts.items() if state in states) for node, counts in service.replicas.items()}
    return {node: n for node, n in sums.items() if n}


def _totals(targets: Mapping[str, Target]) -> str:
    return ", ".join(f"{name} {t.replicas}" + (f"+{t.standby}" if t.standby else "") for name, t in targets.items())


def _told(let_out: Mapping[str, LetOut]) -> str:
    told = ", ".join(f"{name} {sum(out.nodes.values())}" for name, out in let_out.items())
    return f"; let out: {told}" if told else ""


def _reason(reason: str, held: Mapping[str, float]) -> str:
    if not held:
        return reason
    stale = ", ".join(f"{name} ({age:.1f} s)" for name, age in held.items())
    return f"{reason}; nothing taken from services whose signal is stale: {stale}"
