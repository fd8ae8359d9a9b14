"""What every autoscaler of totals shares: it says how many replicas each light service should have, and nodes follow.

A rule decides for one service at a time, from what is seen of it and what it remembers. Everything else is here, and equal
for all rules, so that policies are compared by their rules alone: core services keep the replicas they were placed with, the
operator's orders outrank any rule, no service falls below its floor, and where nothing is known nothing changes. What does not
fit on the nodes is not placed, as Kubernetes leaves such pods pending; every service gets its next replica before any gets a
second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator.core import Decision, Node, Observation, Placement, Service, Signal, Target
from orchestrator.errors import Infeasible
from orchestrator.placement import greedy
from orchestrator.scaling.lyapunov import Room
from orchestrator.scaling.manual import running
from orchestrator.scaling.site import Site

M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class Seen:
    """One service at one instant, as a rule sees it. Its signal is there and fresh."""

    t: float
    signal: Signal
    wanted: int
    """Replicas ordered last."""
    ready: int
    """Replicas at work."""
    name: str
    """Of the service."""

    @property
    def ongoing(self) -> float | None:
        """Requests accepted and not answered, those in queue included."""
        return self.signal.inflight

    @property
    def busy(self) -> float | None:
        """Replicas' worth of computing: lambda m / b [erlang]. Tasks are counted as they end, so it does not exceed `ready`."""
        if self.signal.arrival_rate is None:
            return None
        if self.signal.service_s is None:
            return 0.0 if self.signal.arrival_rate == 0.0 else None
        return self.signal.arrival_rate * self.signal.service_s / (self.signal.batch_size or 1.0)


Rule = Callable[[M, Seen], tuple[M, int]]
"""What it remembers after this slot, and the replicas it wants."""


def step(
    site: Site,
    placement: Placement | None,
    memories: Mapping[str, M],
    fresh: M,
    rule: Rule[M],
    observation: Observation,
) -> tuple[Placement | None, dict[str, M], Decision]:
    """One slot of an autoscaler: the placement ordered, what is remembered, and the decision.

    Args:
        site: what there is.
        placement: ordered last; None before the first slot, which starts from what runs.
        memories: of the rule, by service.
        fresh: what the rule remembers of a service it has not seen.
        rule: see `Rule`; called once for every light service whose signal is fresh.
        observation: of this slot.
    """
    current = standing(placement, observation)
    kept = dict(memories)
    asked: dict[str, Target] = {}
    for service in site.services:
        name, standby = service.name, site.targets[service.name].standby
        if name in observation.orders:
            asked[name] = observation.orders[name]
            continue
        now = current.target(name).replicas
        base = Target(max(service.floor, now or site.targets[name].replicas), standby)
        seen = _seen(site, observation, name, base.replicas)
        if service.tier == "core":
            asked[name] = site.targets[name]
        elif seen is None:
            asked[name] = base
        else:
            kept[name], replicas = rule(kept.get(name, fresh), seen)
            asked[name] = Target(max(service.floor, min(replicas, site.most.get(name, replicas))), standby)
    targets = clip(site, asked, current)
    changed = changes(targets, current)
    reason = f"change: {changed}" if changed else "no change"
    if short := ", ".join(f"{name} {asked[name].replicas}" for name in asked if asked[name] != targets[name]):
        reason += f"; no room for all of {short}"
    if placement is not None and not changed:
        return current, kept, Decision(current, reason)
    try:
        desired = place(site, targets, current)
    except Infeasible as error:
        return placement, kept, Decision(None, f"hold: {error}")
    return desired, kept, Decision(desired, reason)


def standing(placement: Placement | None, observation: Observation) -> Placement:
    """What was ordered last, with the standbys that were let out since counted as at work; what runs, before any order."""
    if placement is None:
        return running(observation)
    out = {name: seen.let_out for name, seen in observation.services.items() if any(seen.let_out.values())}
    return placement.with_let_out(out) if out else placement


def place(site: Site, targets: Mapping[str, Target], current: Placement, *, spendable: bool = False) -> Placement:
    """Nodes for these targets: what runs stays; as a rule only services that change, and their neighbours, are looked at anew.

    Core replicas that are missing go where the site says.

    Args:
        site: what there is.
        targets: for all services.
        current: what runs.
        spendable: see `greedy.place`.

    Raises:
        Infeasible: they do not fit.
    """
    changing = {name for name, target in targets.items() if current.target(name) != target}
    concerned = changing | {other for pair in site.flows if changing & set(pair) for other in pair}
    rest = [service for service in site.services if service.name not in concerned]
    nodes = _without(site.nodes, rest, current)
    if any(node.cpus <= 0.0 or node.memory_bytes <= 0 for node in nodes):
        # A node with nothing left is no node: the whole question, then.
        concerned, nodes = {service.name for service in site.services}, list(site.nodes)
    left = greedy.place(
        [service for service in site.services if service.name in concerned],
        nodes,
        {name: target for name, target in targets.items() if name in concerned},
        flows=site.flows,
        latencies_s=site.latencies_s,
        keep=_completed(site, targets, current),
        spendable=spendable,
    )
    return Placement(
        {s.name: placed for s in site.services if (placed := (left if s.name in concerned else current).ready.get(s.name))},
        {s.name: placed for s in site.services if (placed := (left if s.name in concerned else current).standby.get(s.name))},
    )


def _completed(site: Site, targets: Mapping[str, Target], current: Placement) -> Placement:
    """What runs, and the core replicas that it lacks of the site's placement, no more than the targets ask for."""
    ready = dict(current.ready)
    for name, planned in site.placed.items():
        there = dict(ready.get(name, {}))
        missing = targets[name].replicas - sum(there.values()) if name in targets else 0
        for node, count in planned.items():
            more = max(0, min(count - there.get(node, 0), missing))
            if more:
                there[node] = there.get(node, 0) + more
                missing -= more
        ready[name] = there
    return replace(current, ready=ready)


def _without(nodes: tuple[Node, ...], services: list[Service], placement: Placement) -> list[Node]:
    """The nodes with what these services leave of them."""
    cpus = {node.name: node.cpus for node in nodes}
    memory = {node.name: node.memory_bytes for node in nodes}
    gpus = {node.name: node.gpus for node in nodes}
    for service in services:
        for counts, works in ((placement.ready, 1), (placement.standby, 0)):
            for node, n in counts.get(service.name, {}).items():
                if node in cpus:
                    cpus[node] -= works * n * service.cpus
                    memory[node] -= n * service.memory_bytes
                    gpus[node] -= n * service.gpus
    return [Node(node.name, cpus[node.name], memory[node.name], gpus[node.name]) for node in nodes]


def clip(site: Site, asked: Mapping[str, Target], current: Placement) -> dict[str, Target]:
    """The targets that have room beside what runs and stays: cuts come first, then every service grows by one, in turn."""
    room = Room(site.nodes)
    ready: dict[str, int] = {}
    standby: dict[str, int] = {}
    on: dict[str, dict[str, int]] = {}
    for service in site.services:
        ready[service.name] = _keep(room, service, current.ready, asked[service.name].replicas, working=True)
        standby[service.name] = _keep(room, service, current.standby, asked[service.name].standby, working=False)
        on[service.name] = dict(current.ready.get(service.name, {}))
    for counts, working in ((ready, True), (standby, False)):
        goal = {name: target.replicas if working else target.standby for name, target in asked.items()}
        growing = [service for service in site.services if counts[service.name] < goal[service.name]]
        while growing:
            for service in tuple(growing):
                node = room.best(service, on[service.name], working=working)
                if node is not None:
                    room.take(service, node, working=working)
                    on[service.name][node] = on[service.name].get(node, 0) + 1
                    counts[service.name] += 1
                if node is None or counts[service.name] >= goal[service.name]:
                    growing.remove(service)
    return {service.name: Target(ready[service.name], standby[service.name]) for service in site.services}


def _keep(room: Room, service: Service, counts: Mapping[str, Mapping[str, int]], limit: int, *, working: bool) -> int:
    """Replicas that stay, at most so many, the fullest nodes giving up theirs first."""
    held = {node: n for node, n in counts.get(service.name, {}).items() if n > 0}
    while sum(held.values()) > limit:
        held[max(reversed(held), key=lambda node: held[node])] -= 1
    kept = 0
    for node, n in held.items():
        for _ in range(n):
            if room.fits(service, node, working=working):
                room.take(service, node, working=working)
                kept += 1
    return kept


def _seen(site: Site, observation: Observation, name: str, wanted: int) -> Seen | None:
    found = observation.services.get(name)
    if found is None or found.signal is None or found.signal.age_s > site.stale_after_s:
        return None
    ready = sum(states.get("ready", 0) for states in found.replicas.values())
    return Seen(observation.t, found.signal, wanted, ready, name)


def changes(targets: Mapping[str, Target], current: Placement) -> str:
    """What becomes of every service whose target is not what it has, in words; empty where nothing does."""
    told = []
    for name, target in targets.items():
        before = current.target(name)
        if before != target:
            told.append(f"{name} {_text(before)} -> {_text(target)}")
    return ", ".join(told)


def _text(target: Target) -> str:
    return f"{target.replicas}" + (f"+{target.standby}" if target.standby else "")
