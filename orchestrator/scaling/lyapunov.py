"""Drift plus penalty: as many replicas as their cost is worth, given the backlogs and the promises broken so far.

State: Z, a virtual queue of broken promises per pipeline [tasks], and Q, the backlog per service [requests]. Each slot chooses
the replicas N_m of all services at once, to minimise

    V cost(N)  +  sum_m Q_m (Q_m + lambda_m T - N_m T / m_m)+  +  sum_m W_m v_m(N_m)

with W_m = T sum of Z lambda over the pipelines that visit m, and v_m the share of late tasks (`effective_capacity`). The middle
term is Neely's drift, without the service that would find nothing to do; it never saturates, so that a service that is late
whatever it gets still drains. Larger V: cheaper by O(1/V), longer backlogs by O(V).

The theorem asks for slots that are independent and decisions that act at once. Starts take several slots, starting costs, and
v is not convex: the bound is a guide, not a proof, for the whole. Proved for Z alone, on every path: the share of broken
promises up to T is at most epsilon plus Z(T) over the tasks so far, unless Z was cut at its cap.

Sources: Neely, Stochastic Network Optimization, 2010; Neely, sample-path results, 2012.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core import Node, Service
from orchestrator.placement.greedy import EPSILON


def virtual_queue(z: float, broken: float, ended: float, epsilon: float, cap: float) -> float:
    """One slot of Z: min((Z + broken - epsilon ended)+, cap) [tasks].

    Args:
        z: before the slot.
        broken: tasks that ended late, or were dropped, in the slot.
        ended: all tasks that ended in the slot.
        epsilon: the share that may be broken.
        cap: so much is remembered at most, so that a disaster is not made good for ever.
    """
    return min(max(0.0, z + broken - epsilon * ended), cap)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a service has to gain and to pay."""

    service: Service
    floor: int
    """Never fewer, as long as the nodes have room."""
    most: int
    """Never more."""
    running: Mapping[str, int]
    """node -> replicas at work now; these cost no start and stay where they are."""
    work: float
    """Q + lambda T: requests to be served in the slot."""
    queue: float
    """Q [requests]: the price of each request left at its end."""
    served: float
    """T / m: what one replica serves in the slot [requests]."""
    late_weight: float
    """W [tasks^2]."""
    late: Callable[[int], float]
    """v: the share that is late with so many replicas; must not rise."""
    cost: float
    """V times the price of a replica for a slot."""
    start: float
    """V times the price of a start."""

    def worth(self, replicas: int, ahead: int) -> float:
        """What `ahead` replicas more than these save, net of their cost, per replica added."""
        left = max(0.0, self.work - replicas * self.served) - max(0.0, self.work - (replicas + ahead) * self.served)
        better = self.late_weight * (self.late(replicas) - self.late(replicas + ahead)) if self.late_weight > 0.0 else 0.0
        new = max(0, replicas + ahead - max(replicas, sum(self.running.values())))
        return (self.queue * left + better - new * self.start) / ahead - self.cost


def alone(demand: Demand) -> int:
    """What `choose` gives a service where the nodes have room for all: no node is looked at."""
    replicas = min(demand.floor, demand.most)
    while _best_worth(demand, replicas) > 0.0:
        replicas += 1
    return replicas


LOOK_AHEAD = (1, 2, 4, 8)
"""Steps that are tried: v may stay 1 for some replicas and fall only then."""


def choose(
    demands: Sequence[Demand], nodes: Sequence[Node], taken: Sequence[tuple[Service, Mapping[str, int]]] = ()
) -> dict[str, int]:
    """Replicas at work, by service: floors first, then always the replica that is worth most, while any is worth its cost.

    Greedy, one replica at a time: exact where every saving falls with N and all replicas are of one size; about
    (services + replicas added) steps, each a look at one service's nodes.

    Args:
        demands: the services to be chosen for; among equals the first wins.
        nodes: their capacities. No node is ever filled beyond them.
        taken: loaded replicas of others, by node; they go first.
    """
    room = Room(nodes)
    for service, on_nodes in taken:
        for node, count in on_nodes.items():
            for _ in range(count):
                room.take(service, node)
    chosen = {demand.service.name: 0 for demand in demands}
    spare = {demand.service.name: [n for n, count in demand.running.items() for _ in range(count)] for demand in demands}
    on: dict[str, dict[str, int]] = {name: {} for name in chosen}

    def grow(demand: Demand) -> bool:
        name = demand.service.name
        kept = spare[name].pop(0) if spare[name] else None
        node = kept if kept is not None and room.fits(demand.service, kept) else room.best(demand.service, on[name])
        if node is None:
            return False
        room.take(demand.service, node)
        on[name][node] = on[name].get(node, 0) + 1
        chosen[name] += 1
        return True

    # One each, then the next each: where there is no room for all floors, nobody goes without for another's second.
    for level in range(max((demand.floor for demand in demands), default=0)):
        for demand in demands:
            if level < min(demand.floor, demand.most):
                grow(demand)
    worth = {i: _best_worth(demand, chosen[demand.service.name]) for i, demand in enumerate(demands)}
    while worth:
        best = max(worth, key=lambda i: (worth[i], -i))
        if worth[best] <= 0.0:
            break
        if grow(demands[best]):
            worth[best] = _best_worth(demands[best], chosen[demands[best].service.name])
        else:
            del worth[best]
    return chosen


def _best_worth(demand: Demand, replicas: int) -> float:
    steps = [ahead for ahead in LOOK_AHEAD if replicas + ahead <= demand.most]
    return max((demand.worth(replicas, ahead) for ahead in steps), default=0.0)


class Room:
    """What is free on every node."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._free = {node.name: [node.cpus, float(node.memory_bytes), float(node.gpus)] for node in nodes}

    def take(self, service: Service, node: str, *, working: bool = True) -> None:
        """One replica of the service is on the node; one on standby takes no cores."""
        if node in self._free:
            for i, needed in enumerate(_needs(service, working=working)):
                self._free[node][i] -= needed

    def fits(self, service: Service, node: str, *, working: bool = True) -> bool:
        """Whether one more replica fits there."""
        if node not in self._free or (service.nodes and node not in service.nodes):
            return False
        return _within(_needs(service, working=working), self._free[node])

    def best(self, service: Service, on: Mapping[str, int], *, working: bool = True) -> str | None:
        """The node with the fewest replicas of it, then with the most cores left, that has room; None where none has."""
        needs = _needs(service, working=working)
        nodes = [node for node in service.nodes if node in self._free] if service.nodes else self._free
        found, least = None, (math.inf, math.inf)
        for node in nodes:
            badness = (on.get(node, 0), -self._free[node][0])
            if badness < least and _within(needs, self._free[node]):
                found, least = node, badness
        return found


def _within(needs: tuple[float, float, float], free: Sequence[float]) -> bool:
    return needs[0] <= free[0] + EPSILON and needs[1] <= free[1] and needs[2] <= free[2]


def _needs(service: Service, *, working: bool) -> tuple[float, float, float]:
    return (service.cpus if working else 0.0, float(service.memory_bytes), float(service.gpus))
