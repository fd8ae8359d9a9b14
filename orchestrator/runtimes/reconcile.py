"""From what runs to what should: the ordered steps that may be taken now, for every runtime.

A pure function, called again whenever a replica changes state, so a plan never waits inside itself: a replica that has to
load first is started by one plan and promoted by a later one. The rules, in the order of the steps of each service:

    promote   a loaded standby where a ready one is wanted; any standby where too few are ready in all
    start     what is missing, on the node where it is missing; standbys once nothing that should be ready is loading
    demote    a ready replica too many, where a standby is missing
    drain     what is too many, and one outdated replica at a time once its successor is ready

Promises (tests/orchestrator/runtimes/test_reconcile.py): after no step of any plan are fewer replicas ready than the smaller
of what was and what is wanted, nor fewer than the service's floor if the floor was kept; a node never holds more than one
replica above its capacity; and repeated plans reach the desired state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from orchestrator.core import Counts, Node, Placement, Replica, Service

EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Start:
    """Start a replica; it loads, and is on standby when it has."""

    service: str
    node: str


@dataclass(frozen=True, slots=True)
class Change:
    """Do something to a replica: route to it, stop routing to it, or let it finish and stop."""

    verb: Literal["promote", "demote", "drain"]
    replica: str


Step = Start | Change


def reconcile(
    replicas: Sequence[Replica],
    desired: Placement,
    services: Mapping[str, Service],
    nodes: Mapping[str, Node],
    *,
    blocked: Collection[tuple[str, str]] = (),
    surge: int = 1,
) -> tuple[Step, ...]:
    """Steps that may be taken now, in this order.

    Args:
        replicas: what runs. One whose service is not in `services` is drained.
        desired: what should run; must fit the nodes, and want at least the floor of every service.
        services: what a replica of each service needs, and its floor.
        nodes: capacities. A ready or draining replica takes cores, any replica memory and GPUs.
        blocked: (service, node) where nothing may be started now, because the last start there failed.
        surge: 1 lets a node hold one replica more than fits while another leaves; 0 does not.
    """
    steps = _plan(replicas, desired, services, nodes, blocked, surge)
    settling = any(replica.state in ("starting", "draining") for replica in replicas)
    if not steps and not settling:
        # Each waits for room that the other will leave (or everything is as desired, and this plan is empty as well). Over
        # capacity for a moment beats stuck for ever, so the first step that more room would allow is taken.
        steps = _plan(replicas, desired, services, nodes, blocked, None)[:1]
    return tuple(steps)


def outgoing(replicas: Iterable[Replica]) -> str | None:
    """The outdated replica to be replaced now: one at a time over all services, the next when the last is gone."""
    outdated = sorted((r for r in replicas if r.outdated), key=lambda r: (r.service, r.id))
    if any(r.state == "draining" for r in outdated):
        return None
    return next((r.id for r in outdated), None)


def _plan(
    replicas: Sequence[Replica],
    desired: Placement,
    services: Mapping[str, Service],
    nodes: Mapping[str, Node],
    blocked: Collection[tuple[str, str]],
    surge: int | None,
) -> list[Step]:
    world = _World({r.id: r for r in replicas}, nodes, surge, outgoing(replicas))
    known = sorted(services.values(), key=lambda s: (s.tier != "core", s.name))
    for service in known:
        _promote(world, service, desired)
    for service in known:
        _start(world, service, desired.ready, blocked)
    # Loading is the slow part, and standbys would compete for it with what is missed already. (A service that cannot load is
    # blocked between its tries, so it does not keep the standbys of others away.)
    if not any(_waits_for_load(world, service, desired) for service in known):
        for service in known:
            both = {service.name: {node: _wanted_on(desired, service.name, node) for node in nodes}}
            _start(world, service, both, blocked)
    for service in known:
        _release(world, service, desired)
        _drop_idle(world, service, desired)
    for replica in replicas:
        if replica.service not in services and replica.state != "draining":
            world.change("drain", replica)
    return world.steps


@dataclass(slots=True)
class _World:
    """The replicas as they will be after the steps planned so far."""

    replicas: dict[str, Replica]
    nodes: Mapping[str, Node]
    surge: int | None
    outgoing: str | None
    steps: list[Step] = field(default_factory=list)
    started: int = 0
    by_service: dict[str, dict[str, Replica]] = field(init=False)
    """The same replicas: nearly every question is about those of one service."""

    def __post_init__(self) -> None:
        self.by_service = {}
        for replica in self.replicas.values():
            self.by_service.setdefault(replica.service, {})[replica.id] = replica

    def of(self, service: str, *states: str, node: str | None = None, staying: bool = True) -> list[Replica]:
        """Replicas of a service in these states, by id; `staying` leaves out the one that is being replaced."""
        return [
            r
            for _, r in sorted(self.by_service.get(service, {}).items())
            if r.state in states and (node is None or r.node == node) and not (staying and r.id == self.outgoing)
        ]

    def change(self, verb: Literal["promote", "demote", "drain"], replica: Replica) -> None:
        """Plan a change and see the world after it."""
        state: Mapping[str, Literal["ready", "standby", "draining"]] = {
            "promote": "ready", "demote": "standby", "drain": "draining",
        }  # fmt: skip
        self._put(replace(replica, state=state[verb]))
        self.steps.append(Change(verb, replica.id))

    def start(self, service: Service, node: str) -> None:
        """Plan a start and see the world after it."""
        self.started += 1
        name = f"~{self.started}"  # sorts after every real id, and is never written into a step but Start
        self._put(Replica(name, service.name, node, "starting", service.cpus, service.memory_bytes, gpus=service.gpus))
        self.steps.append(Start(service.name, node))

    def _put(self, replica: Replica) -> None:
        self.replicas[replica.id] = replica
        self.by_service.setdefault(replica.service, {})[replica.id] = replica

    def has_cores(self, node: str, cpus: float) -> bool:
        """Whether one more replica may work there."""
        used = sum(r.cpus for r in self.replicas.values() if r.node == node and r.state in ("ready", "draining"))
        return self._fits(used, cpus, self.nodes[node].cpus)

    def has_room(self, node: str, service: Service) -> bool:
        """Whether one more replica may load there."""
        there, has = [r for r in self.replicas.values() if r.node == node], self.nodes[node]
        memory = self._fits(sum(r.memory_bytes for r in there), service.memory_bytes, has.memory_bytes)
        # One that needs no GPU must not wait until somebody else's are free again.
        gpus = not service.gpus or self._fits(sum(r.gpus for r in there), service.gpus, has.gpus)
        return memory and gpus

    def _fits(self, used: float, more: float, capacity: float) -> bool:
        if self.surge is None:
            return True
        return used + (0 if self.surge else more) <= capacity + EPSILON


def _promote(world: _World, service: Service, desired: Placement) -> None:
    wanted = desired.target(service.name).replicas
    for node in world.nodes:
        missing = desired.ready_on(service.name, node) - len(world.of(service.name, "ready", node=node))
        for replica in world.of(service.name, "standby", node=node)[: max(0, missing)]:
            if world.has_cores(node, replica.cpus):
                world.change("promote", replica)
    # A standby elsewhere covers for one that died until that is back: a change of routes takes milliseconds, a start seconds.
    for replica in world.of(service.name, "standby"):
        short = len(world.of(service.name, "ready", staying=False)) < wanted
        if short and replica.node in world.nodes and world.has_cores(replica.node, replica.cpus):
            world.change("promote", replica)


def _start(world: _World, service: Service, wanted: Counts, blocked: Collection[tuple[str, str]]) -> None:
    for node in world.nodes:
        if (service.name, node) in blocked:
            continue
        there = len(world.of(service.name, "ready", "standby", "starting", node=node))
        for _ in range(wanted.get(service.name, {}).get(node, 0) - there):
            if world.has_room(node, service):
                world.start(service, node)


def _waits_for_load(world: _World, service: Service, desired: Placement) -> bool:
    short = len(world.of(service.name, "ready", staying=False)) < desired.target(service.name).replicas
    return short and bool(world.of(service.name, "starting"))


def _release(world: _World, service: Service, desired: Placement) -> None:
    """Take surplus replicas out of the routes: the outdated one first, then from the nodes that have too many."""
    keep = max(desired.target(service.name).replicas, service.floor)
    while len(world.of(service.name, "ready", staying=False)) > keep:
        victim = _surplus(world, service, desired)
        if victim is None:
            return
        idle = len(world.of(service.name, "standby", "starting", node=victim.node))
        lacks_standby = idle < desired.standby_on(service.name, victim.node)
        world.change("demote" if lacks_standby and not victim.outdated else "drain", victim)


def _surplus(world: _World, service: Service, desired: Placement) -> Replica | None:
    ready = world.of(service.name, "ready", staying=False)
    leaving = [r for r in ready if r.id == world.outgoing]
    if leaving:
        return leaving[0]
    over: Callable[[Replica], int] = lambda r: (  # noqa: E731 - a key, used twice
        len(world.of(service.name, "ready", node=r.node)) - desired.ready_on(service.name, r.node)
    )
    fullest = max(ready, key=over)
    return fullest if over(fullest) > 0 else None


def _drop_idle(world: _World, service: Service, desired: Placement) -> None:
    """Stop what waits in vain: standbys and replicas still loading, beyond what their node is to have."""
    places = dict.fromkeys([*world.nodes, *(r.node for r in world.of(service.name, "starting", "standby"))])
    for node in places:
        there = world.of(service.name, "ready", "standby", "starting", node=node)
        idle = [*world.of(service.name, "starting", node=node), *world.of(service.name, "standby", node=node)]
        for replica in idle[: max(0, len(there) - _wanted_on(desired, service.name, node))]:
            world.change("drain", replica)
    leaving = [r for r in world.of(service.name, "starting", "standby", staying=False) if r.id == world.outgoing]
    for replica in leaving:
        loaded = len(world.of(service.name, "ready", "standby", node=replica.node))
        if replica.state == "starting" or loaded >= _wanted_on(desired, service.name, replica.node):
            world.change("drain", replica)


def _wanted_on(desired: Placement, service: str, node: str) -> int:
    return desired.ready_on(service, node) + desired.standby_on(service, node)
