"""The placement problem as frozen data, and the arrays that the solvers read it as.

`survey` builds one from a testbed, `program` solves it, `baselines` solve it otherwise, `flows` judges any placement. Only what
is placed by the program is a service here (the core tier); light stages stand in it as a reserve on the nodes and as delay on
the edges they lie on. Units: seconds, bytes, cores, tasks/s, and the testbed's cost unit per second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.core import Node, Placement, Service
from orchestrator.errors import UsageError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
RESOURCES = ("cpus", "MiB", "gpus")
"""In the order of every array over resources; memory is counted in MiB there, so that all numbers have like sizes."""
MIB = 2**20
EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Hosted:
    """A service that the program places."""

    service: Service
    """What one replica needs, and where it may run."""
    service_s: float
    """Mean service time of one task [s]."""
    throughput: float
    """What one replica does at most [tasks/s]."""
    least: int = 1
    """Replicas in all, whatever the demand."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A step of a pipeline at a placed service."""

    id: str
    service: str


@dataclass(frozen=True, slots=True)
class Edge:
    """Tensors on their way between two visits; no source is the gateway's request, no target the answer to it."""

    source: str | None
    target: str | None
    bytes_per_task: float
    delay_s: float = 0.0
    """Service times of the light stages that lie on the edge."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A pipeline as a DAG of visits, parents before children, with the load it brings."""

    name: str
    rate: float
    """[tasks/s], > 0."""
    deadline_s: float
    visits: tuple[Visit, ...]
    edges: tuple[Edge, ...]
    entry: Mapping[str, float]
    """Node -> share of the tasks that enter, and leave, there. Sums to 1."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What is asked of a placement, and what things cost."""

    kappa: int = 2
    """Least number of distinct nodes of each service."""
    most_nodes: int | None = None
    """Most nodes of each service."""
    most_nodes_in_all: int | None = None
    """Most nodes with any service on them."""
    gamma: float = 0.5
    """Share of every pipeline's load to be carried, within its deadline, after the loss of any one node; 0: none."""
    utilisation: float = 0.8
    """Most load of a replica, as a share of its throughput,"""
    utilisation_after_loss: float = 0.95
    """and once a node is lost."""
    link_share: float = 0.8
    """Most traffic of a link, as a share of its bandwidth, in each direction."""
    cpu_price: float = 1.0
    """Of a core reserved for a replica, per second."""
    node_price: float = 0.0
    """Of a node with anything on it, per second."""
    latency_weight: float = 1.0
    """omega: cost of one task on the way for a second."""
    link_weight: float = 0.1
    """phi: cost of the busiest link being full."""
    move_price: float = 0.0
    """Of a replica where none runs now, per second: its start, spread over the time the placement is to last."""
    drop_price: float = 0.0
    """Of a replica that runs now and is given up."""
    budget: float | None = None
    """Most that the cores of all replicas may cost per second."""

    def __post_init__(self) -> None:
        """Reject what no placement could mean."""
        for key in ("gamma", "utilisation", "utilisation_after_loss", "link_share"):
            value = getattr(self, key)
            if not 0 <= value <= 1 or (value == 0 and key != "gamma"):
                raise UsageError(f"{key} is {value:g}; it is a share, above 0 and at most 1 (gamma may be 0)")
        for key in ("kappa", "most_nodes", "most_nodes_in_all"):
            count = getattr(self, key)
            if count is not None and count < 1:
                raise UsageError(f"{key} is {count}; a service needs at least 1 node")
        for key in ("cpu_price", "node_price", "latency_weight", "link_weight", "move_price", "drop_price"):
            if getattr(self, key) < 0:
                raise UsageError(f"{key} is {getattr(self, key):g}; it must not be negative")


@dataclass(frozen=True, slots=True)
class Strain:
    """How hard the time after a loss is taken to be."""

    load: float
    """What is to be carried, as a share of every pipeline's load; above 1 for replicas that are less than full then."""
    deadline: float = 1.0
    """Share of its deadline that a task may take without waiting; the rest is left for waits."""

    def on(self, problem: Problem) -> Problem:
        """The problem as it is to be judged after that loss."""
        if self.deadline == 1.0:
            return problem
        return replace(problem, demands=tuple(replace(d, deadline_s=d.deadline_s * self.deadline) for d in problem.demands))


@dataclass(frozen=True)
class Problem:
    """Everything a placement depends on."""

    nodes: tuple[Node, ...]
    services: tuple[Hosted, ...]
    demands: tuple[Demand, ...]
    latencies_s: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Both directions; a pair that is missing is at no distance."""
    bandwidths: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """[bytes/s] of each direction; a pair that is missing has no limit."""
    reserve: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Cores, MiB and GPUs that must stay free for the light services, over all nodes."""
    parameters: Parameters = Parameters()

    def __post_init__(self) -> None:
        """Reject dangling names early, where they can still be told."""
        nodes, services = {n.name for n in self.nodes}, {h.service.name for h in self.services}
        for demand in self.demands:
            if unknown := {v.service for v in demand.visits} - services:
                raise UsageError(f"pipeline {demand.name} visits {', '.join(sorted(unknown))}, which is not among the services")
            if unknown := set(demand.entry) - nodes:
                raise UsageError(f"pipeline {demand.name} enters at {', '.join(sorted(unknown))}, which is not among the nodes")

    @cached_property
    def arrays(self) -> Arrays:
        """The problem as arrays, in the order of its tuples."""
        return Arrays(self)


class Arrays:
    """Index maps and matrices of a problem: s services, n nodes, r resources, k demands."""

    def __init__(self, problem: Problem) -> None:
        p = problem.parameters
        self.demands = problem.demands
        self.node = {node.name: i for i, node in enumerate(problem.nodes)}
        self.service = {hosted.service.name: i for i, hosted in enumerate(problem.services)}
        self.capacity = np.array([[n.cpus, n.memory_bytes / MIB, n.gpus] for n in problem.nodes], float).reshape(-1, 3)
        self.needs = np.array(
            [[h.service.cpus, h.service.memory_bytes / MIB, h.service.gpus] for h in problem.services], float
        ).reshape(-1, 3)
        self.throughput = np.array([h.throughput for h in problem.services], float)
        self.allowed: Bools = np.array(
            [[not h.service.nodes or n.name in h.service.nodes for n in problem.nodes] for h in problem.services], bool
        ).reshape(len(problem.services), len(problem.nodes))
        self.latency = _matrix(problem.latencies_s, self.node, 0.0)
        self.bandwidth = _matrix(problem.bandwidths, self.node, math.inf)
        self.rates = np.array([d.rate for d in problem.demands], float)
        self.visits = np.zeros((len(problem.services), len(problem.demands)))
        """visits[s, k]: how often a task of demand k visits service s."""
        for k, demand in enumerate(problem.demands):
            for visit in demand.visits:
                self.visits[self.service[visit.service], k] += 1
        self.need = np.maximum(
            whole(self.visits @ self.rates / (p.utilisation * self.throughput)), [h.least for h in problem.services]
        )
        """Replicas in all."""
        self.need_after_loss = whole(p.gamma * (self.visits @ self.rates) / (p.utilisation_after_loss * self.throughput))
        """Replicas that must be left when any node is lost."""

    def link_s(self, edge: Edge) -> Floats:
        """Time on the way from node u to node v [s], shape (n, n): latency plus bytes over bandwidth."""
        return self.latency + edge.bytes_per_task / self.bandwidth

    def counts(self, placement: Placement) -> Floats:
        """x[s, n] of a placement; nodes and services it has beside the problem's are left out."""
        x = np.zeros((len(self.service), len(self.node)))
        for service, s in self.service.items():
            for node, n in self.node.items():
                x[s, n] = placement.ready_on(service, node)
        return x

    def placement(self, x: Floats) -> Placement:
        """The placement with these counts."""
        rows = {
            service: {node: round(x[s, n]) for node, n in self.node.items() if round(x[s, n])}
            for service, s in self.service.items()
        }
        return Placement({service: row for service, row in rows.items() if row})

    def commodities(self, lost: int | None = None) -> tuple[Demand, ...]:
        """Every demand, apart by the node where its tasks enter: an answer goes back to where its request came from."""
        names = list(self.node)
        return tuple(
            replace(demand, rate=demand.rate * float(share), entry={names[n]: 1.0})
            for demand in self.demands
            for n, share in enumerate(self.entry(demand, lost))
            if share > 0
        )

    def entry(self, demand: Demand, lost: int | None = None) -> Floats:
        """Share of a demand's tasks that enter at each node.

        Users of a lost node come in through the other entries, in proportion, or where there is none through all nodes alike.
        """
        shares = np.zeros(len(self.node))
        for node, share in demand.entry.items():
            shares[self.node[node]] = share
        if lost is not None:
            shares[lost] = 0.0
            if shares.sum() <= EPSILON:
                shares[:] = 1.0
                shares[lost] = 0.0
        total = shares.sum()
        return shares / total if total > 0 else shares


def whole(values: Floats) -> Floats:
    """Rounded up, but for rounding errors."""
    found: Floats = np.ceil(values - EPSILON)
    return found


def _matrix(pairs: Mapping[tuple[str, str], float], index: Mapping[str, int], missing: float) -> Floats:
    found = np.full((len(index), len(index)), missing)
    for (a, b), value in pairs.items():
        if a in index and b in index:
            found[index[a], index[b]] = value
    np.fill_diagonal(found, 0.0 if missing == 0 else math.inf)
    return found


def in_time(problem: Problem, demand: Demand, hosts: Bools, lost: int | None = None) -> list[Bools]:
    """For each edge of a demand, the node pairs (u, v) over which some task can still meet the deadline, shape (n, n).

    Max-plus recursion over the DAG, forwards for the earliest arrival at each node and backwards for the least time left
    (arXiv 2601.19563, eqs. (4)-(5) and (9)). A pair is dropped when the best of all tasks through it is late. That is needed,
    not sufficient: two pairs that are each in time may be late together, and queueing comes on top.

    Args:
        problem: for links and service times.
        demand: one of the problem's commodities.
        hosts: hosts[s, n]: whether service s may run on node n.
        lost: index of a node that is gone.
    """
    arrays = problem.arrays
    entry = arrays.entry(demand)
    service_s = {h.service.name: h.service_s for h in problem.services}
    open_at = {v.id: hosts[arrays.service[v.service]].copy() for v in demand.visits}
    if lost is not None:
        for row in open_at.values():
            row[lost] = False
    ends: dict[str | None, Floats] = {None: np.where(entry > 0, 0.0, math.inf)}
    ways = [arrays.link_s(edge) + edge.delay_s for edge in demand.edges]
    done = dict(ends)
    for visit in demand.visits:
        arrivals = [
            (done[e.source][:, None] + w).min(axis=0) for e, w in zip(demand.edges, ways, strict=True) if e.target == visit.id
        ]
        done[visit.id] = np.where(open_at[visit.id], _slowest(arrivals, entry) + service_s[visit.service], math.inf)
    left: dict[str | None, Floats] = dict(ends)
    for visit in reversed(demand.visits):
        rests = [
            (w + left[e.target][None, :]).min(axis=1) for e, w in zip(demand.edges, ways, strict=True) if e.source == visit.id
        ]
        left[visit.id] = np.where(open_at[visit.id], _slowest(rests, entry) + service_s[visit.service], math.inf)
    return [
        done[e.source][:, None] + w + left[e.target][None, :] <= demand.deadline_s + EPSILON
        for e, w in zip(demand.edges, ways, strict=True)
    ]


def _slowest(times: list[Floats], like: Floats) -> Floats:
    """The join waits for the slowest; a visit without edges on this side waits for nothing."""
    found: Floats = np.array(times).reshape(-1, len(like)).max(axis=0, initial=0.0)
    return found
