"""First-fit placement: core services first, each replica on the best node that still has room.

What runs already stays where it is; new replicas of a service spread over the nodes (so that the loss of one node leaves
others), and among equally good nodes the one nearest to the services it talks to wins. A heuristic: where it finds no place a
cleverer solver might, and its error says what would be enough for it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.core import Node, Placement, Service, Target
from orchestrator.errors import Infeasible

EPSILON = 1e-9
"""Tolerance for sums of cores such as 0.1 + 0.2."""


def place(
    services: Sequence[Service],
    nodes: Sequence[Node],
    targets: Mapping[str, Target],
    *,
    flows: Iterable[tuple[str, str]] = (),
    latencies_s: Mapping[tuple[str, str], float] | None = None,
    keep: Placement | None = None,
    spendable: bool = False,
) -> Placement:
    """Nodes for every replica that the targets ask for.

    Args:
        services: what may be placed; one that `targets` does not name gets no replicas.
        nodes: capacities. A replica at work takes cores, memory and GPUs, a standby one no cores.
        targets: replicas wanted, by service.
        flows: pairs of services that send each other tensors.
        latencies_s: (node, node) -> latency [s]; a pair that is missing is at no distance.
        keep: what runs now. Its replicas stay where they are, as far as the targets still want them.
        spendable: a new standby prefers nodes that will have the cores for it when it is let out, all standbys there included.

    Raises:
        Infeasible: some replica has no place even when everything may move.
    """
    wanted = [s for s in sorted(services, key=_difficulty, reverse=True) if s.name in targets]
    neighbours = _neighbours(flows)

    def attempt(kept: Placement) -> Placement:
        return _fill(_Board(tuple(nodes), neighbours, latencies_s or {}, spendable=spendable), wanted, targets, kept)

    if keep is not None:
        with contextlib.suppress(Infeasible):
            return attempt(keep)
    return attempt(Placement())


def _difficulty(service: Service) -> tuple[bool, int, float, int]:
    """Services are placed from the most difficult one to the easiest."""
    return (service.tier == "core", service.gpus, service.cpus, service.memory_bytes)


def _fill(board: _Board, services: Sequence[Service], targets: Mapping[str, Target], keep: Placement) -> Placement:
    """Claims of what runs come first, for all services; only then do new replicas look for room."""
    for service in services:
        _retain(board, service, targets[service.name], keep)
    for service in services:
        target = targets[service.name]
        for number in range(board.count(board.ready, service), target.replicas):
            board.put_ready(service, number, target.replicas, keep)
    for service in services:
        target = targets[service.name]
        for number in range(board.count(board.standby, service), target.standby):
            board.put_standby(service, number, target.standby)
    return Placement(board.ready, board.standby)


def _retain(board: _Board, service: Service, target: Target, keep: Placement) -> None:
    """Keep ready replicas at work and standbys idle where they are; give up those on the fullest nodes first."""
    for counts, current, limit in (
        (board.ready, keep.ready, target.replicas),
        (board.standby, keep.standby, target.standby),
    ):
        known = ((board.index[name], count) for name, count in current.get(service.name, {}).items() if name in board.index)
        held = {node: count for node, count in sorted(known) if count > 0 and board.allows(service, board.nodes[node])}
        for _ in range(sum(held.values()) - limit):
            # The last of the fullest nodes, so that what is left stays spread.
            fullest = max(reversed(held), key=lambda node: held[node])
            held[fullest] -= 1
        for node, count in held.items():
            for _ in range(count):
                if board.fits(service, node, working=counts is board.ready):
                    board.claim(counts, service, node)


class _Identity:
    """Something that is equal only to itself, so that what was made of it can be found again without reading it."""

    __slots__ = ("of",)

    def __init__(self, of: Mapping[tuple[str, str], float]) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.of is self.of

    def __hash__(self) -> int:
        return id(self.of)


@functools.lru_cache(maxsize=8)
def _matrix(latencies_s: _Identity, names: tuple[str, ...]) -> NDArray[np.float64]:
    """Latencies from row to column [s], in the order of the names."""
    index = {name: i for i, name in enumerate(names)}
    matrix = np.zeros((len(names), len(names)))
    for (a, b), latency_s in latencies_s.of.items():
        if a in index and b in index:
            matrix[index[a], index[b]] = latency_s
    return matrix


class _Board:
    """Nodes with what has been put on them so far. Nodes are named by their index; a choice looks at all of them at once."""

    def __init__(
        self,
        nodes: tuple[Node, ...],
        neighbours: Mapping[str, frozenset[str]],
        latencies_s: Mapping[tuple[str, str], float],
        *,
        spendable: bool = False,
    ) -> None:
        self.nodes, self.neighbours, self.spendable = nodes, neighbours, spendable
        self.index = {node.name: i for i, node in enumerate(nodes)}
        self.latencies_s = latencies_s
        self.ready: dict[str, dict[str, int]] = {}
        self.standby: dict[str, dict[str, int]] = {}
        self.cpus = np.zeros(len(nodes))
        self.memory = np.zeros(len(nodes))
        self.gpus = np.zeros(len(nodes))
        self.idle_cpus = np.zeros(len(nodes))
        """Cores that the standbys would need at work."""
        self._all_cpus = np.array([node.cpus for node in nodes], dtype=float)
        self._all_memory = np.array([node.memory_bytes for node in nodes], dtype=float)
        self._all_gpus = np.array([node.gpus for node in nodes], dtype=float)
        self._distances: dict[str, NDArray[np.float64]] = {}

    def put_ready(self, service: Service, placed: int, wanted: int, keep: Placement) -> None:
        """On the node with the fewest replicas of the service; then where one waits on standby; then near; then roomy."""
        on = self._counts(self.ready.get(service.name, {}))
        idle = self._counts(keep.standby.get(service.name, {})) > self._counts(self.standby.get(service.name, {}))
        fitting = self._fitting(service, placed, wanted, working=True)
        keys = (on, ~idle, self._distance_s(service), self.cpus - self._all_cpus)
        self.claim(self.ready, service, _least(fitting, keys))

    def put_standby(self, service: Service, placed: int, wanted: int) -> None:
        """On the node with the fewest replicas of the service of any kind; then near; then with the most memory left."""
        there = self._counts(self.ready.get(service.name, {})) + self._counts(self.standby.get(service.name, {}))
        fitting = self._fitting(service, placed, wanted, working=False)
        stuck = service.cpus > self._all_cpus - self.cpus - self.idle_cpus + EPSILON if self.spendable else there
        keys = (stuck, there, self._distance_s(service), self.memory - self._all_memory)
        self.claim(self.standby, service, _least(fitting, keys))

    def _counts(self, on_nodes: Mapping[str, int]) -> NDArray[np.int64]:
        counts = np.zeros(len(self.nodes), dtype=np.int64)
        for name, count in on_nodes.items():
            if name in self.index:
                counts[self.index[name]] = count
        return counts

    def _fitting(self, service: Service, placed: int, wanted: int, *, working: bool) -> NDArray[np.intp]:
        room = (service.memory_bytes <= self._all_memory - self.memory) & (service.gpus <= self._all_gpus - self.gpus)
        if working:
            room &= service.cpus <= self._all_cpus - self.cpus + EPSILON
        if service.nodes:
            allowed = np.zeros(len(self.nodes), dtype=bool)
            allowed[[self.index[name] for name in service.nodes if name in self.index]] = True
            room &= allowed
        fitting = np.flatnonzero(room)
        if not len(fitting):
            raise Infeasible(self._explain(service, placed, wanted, working=working))
        return fitting

    def _explain(self, service: Service, placed: int, wanted: int, *, working: bool) -> str:
        """Names what lacks on every node, and the smallest relaxation: the node that lacks the least, as a share of it."""
        allowed = [node for node in self.nodes if self.allows(service, node)]
        lacks = {node: self._shortage(service, node, working=working) for node in allowed}
        nearest = min(allowed, key=lambda n: lacks[n].share_of(n))
        kind = "replica" if working else "standby"
        needs = _Amount(service.cpus if working else 0.0, service.memory_bytes, service.gpus)
        listed = "; ".join(f"{node.name} lacks {lacks[node]}" for node in allowed)
        return (
            f"no node has room for {kind} {placed + 1} of {wanted} of {service.name} ({needs}): {listed}. The smallest "
            f"relaxation: give {nearest.name} {lacks[nearest]} more, or ask for {placed}"
        )

    def _shortage(self, service: Service, node: Node, *, working: bool) -> _Amount:
        i = self.index[node.name]
        cpus = max(0.0, service.cpus - (node.cpus - float(self.cpus[i]))) if working else 0.0
        gpus = max(0, service.gpus - (node.gpus - int(self.gpus[i])))
        return _Amount(cpus, max(0, service.memory_bytes - (node.memory_bytes - int(self.memory[i]))), gpus)

    def claim(self, counts: dict[str, dict[str, int]], service: Service, node: int) -> None:
        """Put one more replica of the service on the node."""
        on_nodes, name = counts.setdefault(service.name, {}), self.nodes[node].name
        on_nodes[name] = on_nodes.get(name, 0) + 1
        self.memory[node] += service.memory_bytes
        self.gpus[node] += service.gpus
        if counts is self.ready:
            self.cpus[node] += service.cpus
            for neighbour in self.neighbours.get(service.name, ()):
                self._distances.pop(neighbour, None)
        else:
            self.idle_cpus[node] += service.cpus

    def fits(self, service: Service, node: int, *, working: bool) -> bool:
        """Whether one more replica fits."""
        if working and service.cpus > self._all_cpus[node] - self.cpus[node] + EPSILON:
            return False
        return bool(
            service.memory_bytes <= self._all_memory[node] - self.memory[node]
            and service.gpus <= self._all_gpus[node] - self.gpus[node]
        )

    def allows(self, service: Service, node: Node) -> bool:
        """Whether the service may run there at all."""
        return not service.nodes or node.name in service.nodes

    def count(self, counts: Mapping[str, Mapping[str, int]], service: Service) -> int:
        """Replicas of the service on all nodes."""
        return sum(counts.get(service.name, {}).values())

    def _distance_s(self, service: Service) -> NDArray[np.float64]:
        """From every node: latency to the nearest replica of each neighbour placed so far, summed [s]."""
        found = self._distances.get(service.name)
        if found is None:
            found = self._distances[service.name] = self._measure(service)
        return found

    def _measure(self, service: Service) -> NDArray[np.float64]:
        homes = [
            [self.index[home] for home in placed]
            for neighbour in self.neighbours.get(service.name, ())
            if (placed := self.ready.get(neighbour))
        ]
        if not homes or not self.latencies_s:
            return np.zeros(len(self.nodes))
        matrix = _matrix(_Identity(self.latencies_s), tuple(self.index))
        nearest = [matrix[:, each].min(axis=1) for each in homes]
        if len(nearest) <= 2:
            total: NDArray[np.float64] = np.sum(nearest, axis=0)
            return total
        # An exact sum: neighbours come in no order, and a decision must come out the same in every process.
        return np.array([math.fsum(each) for each in zip(*(column.tolist() for column in nearest), strict=True)])


def _least(nodes: NDArray[np.intp], keys: Sequence[NDArray[Any]]) -> int:
    """The first of these nodes among those with the least first key, of them the least second, and so on."""
    for key in keys:
        if len(nodes) == 1:
            break
        values = key[nodes]
        nodes = nodes[values == values.min()]
    return int(nodes[0])


def _neighbours(flows: Iterable[tuple[str, str]]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for a, b in flows:
        found.setdefault(a, set()).add(b)
        found.setdefault(b, set()).add(a)
    return {name: frozenset(others) for name, others in found.items()}


@dataclass(frozen=True, slots=True)
class _Amount:
    """So much of everything; what is 0 is not told."""

    cpus: float
    memory_bytes: int
    gpus: int

    def share_of(self, node: Node) -> float:
        """The largest share of what the node has."""
        pairs = ((self.cpus, node.cpus), (self.memory_bytes, node.memory_bytes), (self.gpus, node.gpus))
        return max(lack / has if has > 0 else math.inf if lack else 0.0 for lack, has in pairs)

    def __str__(self) -> str:
        parts = [f"{math.ceil(self.cpus * 1000 - EPSILON) / 1000:g} cpus"] if self.cpus > EPSILON else []
        parts += [mebibytes(self.memory_bytes)] if self.memory_bytes > 0 else []
        parts += [f"{self.gpus} gpus"] if self.gpus else []
        return " and ".join(parts) or "nothing"


def mebibytes(size_bytes: int) -> str:
    """`512 MiB`, rounded up."""
    return f"{math.ceil(size_bytes / 2**20)} MiB"
