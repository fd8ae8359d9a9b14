"""First-fit placement: core services first, each replica on the best node that still has room.

What runs already stays where it is; new replicas of a service spread over the nodes (so that the loss of one node leaves
others), and among equally good nodes the one nearest to the services it talks to wins. A heuristic: where it finds no place a
cleverer solver might, and its error says what would be enough for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.core import Node, Placement, Service, Target
from orchestrator.errors import Infeasible

EPSILON = 1e-9
"""Tolerance for sums of cores such as 0.1 + 0.2."""

_Badness = Callable[[Node], tuple[float, ...]]
"""Key by which nodes are compared; the least is the best."""


def place(
    services: Sequence[Service],
    nodes: Sequence[Node],
    targets: Mapping[str, Target],
    *,
    flows: Iterable[tuple[str, str]] = (),
    latencies_s: Mapping[tuple[str, str], float] | None = None,
    keep: Placement | None = None,
) -> Placement:
    """Nodes for every replica that the targets ask for.

    Args:
        services: what may be placed; one that `targets` does not name gets no replicas.
        nodes: capacities. A replica at work takes cores, memory and GPUs, a standby one no cores.
        targets: replicas wanted, by service.
        flows: pairs of services that send each other tensors.
        latencies_s: (node, node) -> latency [s]; a pair that is missing is at no distance.
        keep: what runs now. Its replicas stay where they are, as far as the targets still want them.

    Raises:
        Infeasible: some replica has no place even when everything may move.
    """
    wanted = [s for s in sorted(services, key=_difficulty, reverse=True) if s.name in targets]
    neighbours = _neighbours(flows)

    def attempt(kept: Placement) -> Placement:
        return _fill(_Board(tuple(nodes), neighbours, latencies_s or {}), wanted, targets, kept)

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
        held = {n.name: current.get(service.name, {}).get(n.name, 0) for n in board.nodes if board.allows(service, n)}
        while sum(held.values()) > limit:
            # The last of the fullest nodes, so that what is left stays spread.
            fullest = max(reversed(held), key=lambda name: held[name])
            held[fullest] -= 1
        for node in board.nodes:
            for _ in range(held.get(node.name, 0)):
                if board.fits(service, node, working=counts is board.ready):
                    board.claim(counts, service, node)


@dataclass(slots=True)
class _Board:
    """Nodes with what has been put on them so far."""

    nodes: tuple[Node, ...]
    neighbours: Mapping[str, frozenset[str]]
    latencies_s: Mapping[tuple[str, str], float]
    ready: dict[str, dict[str, int]] = field(default_factory=dict)
    standby: dict[str, dict[str, int]] = field(default_factory=dict)
    cpus: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    gpus: dict[str, int] = field(default_factory=dict)

    def put_ready(self, service: Service, placed: int, wanted: int, keep: Placement) -> None:
        """On the node with the fewest replicas of the service; then where one waits on standby; then near; then roomy."""

        def badness(node: Node) -> tuple[float, ...]:
            waits = keep.standby_on(service.name, node.name) > self.standby.get(service.name, {}).get(node.name, 0)
            return (self.on(self.ready, service, node), not waits, self.distance_s(service, node), -self.free_cpus(node))

        self.claim(self.ready, service, self._choose(service, placed, wanted, badness, working=True))

    def put_standby(self, service: Service, placed: int, wanted: int) -> None:
        """On the node with the fewest replicas of the service of any kind; then near; then with the most memory left."""

        def badness(node: Node) -> tuple[float, ...]:
            there = self.on(self.ready, service, node) + self.on(self.standby, service, node)
            return (there, self.distance_s(service, node), -self.free_memory(node))

        self.claim(self.standby, service, self._choose(service, placed, wanted, badness, working=False))

    def _choose(self, service: Service, placed: int, wanted: int, badness: _Badness, *, working: bool) -> Node:
        fitting = [node for node in self.nodes if self.allows(service, node) and self.fits(service, node, working=working)]
        if not fitting:
            raise Infeasible(self._explain(service, placed, wanted, working=working))
        return min(fitting, key=badness)

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
        cpus = max(0.0, service.cpus - self.free_cpus(node)) if working else 0.0
        gpus = max(0, service.gpus - self.free_gpus(node))
        return _Amount(cpus, max(0, service.memory_bytes - self.free_memory(node)), gpus)

    def claim(self, counts: dict[str, dict[str, int]], service: Service, node: Node) -> None:
        """Put one more replica of the service on the node."""
        on_nodes = counts.setdefault(service.name, {})
        on_nodes[node.name] = on_nodes.get(node.name, 0) + 1
        self.memory[node.name] = self.memory.get(node.name, 0) + service.memory_bytes
        self.gpus[node.name] = self.gpus.get(node.name, 0) + service.gpus
        if counts is self.ready:
            self.cpus[node.name] = self.cpus.get(node.name, 0.0) + service.cpus

    def fits(self, service: Service, node: Node, *, working: bool) -> bool:
        """Whether one more replica fits."""
        if working and service.cpus > self.free_cpus(node) + EPSILON:
            return False
        return service.memory_bytes <= self.free_memory(node) and service.gpus <= self.free_gpus(node)

    def allows(self, service: Service, node: Node) -> bool:
        """Whether the service may run there at all."""
        return not service.nodes or node.name in service.nodes

    def free_cpus(self, node: Node) -> float:
        """Cores not reserved yet."""
        return node.cpus - self.cpus.get(node.name, 0.0)

    def free_memory(self, node: Node) -> int:
        """Memory not reserved yet [bytes]."""
        return node.memory_bytes - self.memory.get(node.name, 0)

    def free_gpus(self, node: Node) -> int:
        """GPUs not reserved yet."""
        return node.gpus - self.gpus.get(node.name, 0)

    def on(self, counts: Mapping[str, Mapping[str, int]], service: Service, node: Node) -> int:
        """Replicas of the service on the node."""
        return counts.get(service.name, {}).get(node.name, 0)

    def count(self, counts: Mapping[str, Mapping[str, int]], service: Service) -> int:
        """Replicas of the service on all nodes."""
        return sum(counts.get(service.name, {}).values())

    def distance_s(self, service: Service, node: Node) -> float:
        """Latency to the nearest replica of each neighbour placed so far, summed [s]."""
        homes = [self.ready.get(neighbour, {}) for neighbour in self.neighbours.get(service.name, frozenset())]
        # An exact sum: neighbours come in no order, and a decision must come out the same in every process.
        return math.fsum(min(self.latencies_s.get((node.name, home), 0.0) for home in each) for each in homes if each)


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
