"""Placement problems for tests: one worked by hand, small random ones, and a brute force that shares no code with the program.

The brute force tries every table of replicas and routes each along whole paths (one variable per way of serving a task), where
the program and `flows` use flows over edges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from orchestrator.core import Node, Service
from orchestrator.placement.problem import Demand, Edge, Hosted, Parameters, Problem, Visit

MIB = 2**20
LINE = {("a", "b"): 5.0, ("b", "c"): 5.0, ("a", "c"): 10.0}
CHAIN = ((Visit("1", "s0"), Visit("2", "s1")), ((None, "1"), ("1", "2"), ("2", None)))
JOIN = ((Visit("1", "s0"), Visit("2", "s1"), Visit("3", "s2")), ((None, "1"), (None, "2"), ("1", "3"), ("2", "3"), ("3", None)))


def both_ways(pairs: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    return {**pairs, **{(b, a): value for (a, b), value in pairs.items()}}


def service(name: str, cpus: float = 1.0, memory_mib: int = 1, nodes: tuple[str, ...] = ()) -> Service:
    return Service(name, "core", cpus, memory_mib * MIB, nodes=nodes)


def line(cores: float, weight: float, gamma: float = 0.0) -> Problem:
    """a -5- b -5- c; 60 % of tasks enter at a and 40 % at c, and each visits s0 and then s1. A replica costs 4."""
    hosted = tuple(Hosted(service(name), 0.1, 100.0) for name in ("s0", "s1"))
    edges = (Edge(None, "1", 0.0), Edge("1", "2", 0.0))
    demand = Demand("p", 1.0, 1e6, CHAIN[0], edges, {"a": 0.6, "c": 0.4})
    parameters = Parameters(kappa=1, gamma=gamma, cpu_price=4.0, latency_weight=weight, link_weight=0.0)
    nodes = tuple(Node(name, cores, 100 * MIB) for name in "abc")
    return Problem(nodes, hosted, (demand,), both_ways(LINE), parameters=parameters)


def small(seed: int) -> Problem:
    """Two services on three nodes, or three services that join on two; a third of these have no solution."""
    rng = np.random.default_rng(seed)
    joined = bool(rng.integers(2))
    names, (visits, pairs) = ("ab", JOIN) if joined else ("abc", CHAIN)
    nodes = tuple(Node(name, float(rng.integers(2, 5)), int(rng.integers(4, 9)) * 100 * MIB) for name in names)
    hosted = tuple(
        Hosted(
            service(f"s{i}", float(rng.choice([0.5, 1.0, 1.5])), 100 * int(rng.integers(1, 3))),
            0.01,
            float(rng.integers(8, 16)),
        )
        for i in range(len(visits))
    )
    links = list(itertools.combinations(names, 2))
    latencies = both_ways({pair: float(rng.choice([0.01, 0.05, 0.2])) for pair in links})
    bandwidths = both_ways({pair: float(rng.choice([50.0, 200.0, 1000.0])) for pair in links})
    edges = tuple(Edge(a, b, float(rng.integers(1, 10))) for a, b in pairs)
    demand = Demand(
        "p", float(rng.integers(2, 12)), float(rng.choice([0.3, 0.6, 2.0])), visits, edges, {str(rng.choice(list(names))): 1.0}
    )
    parameters = Parameters(
        kappa=int(rng.integers(1, 3)), most_nodes=int(rng.integers(2, 4)), gamma=float(rng.choice([0.0, 0.5, 0.8])),
        latency_weight=float(rng.choice([0.1, 1.0, 5.0])), node_price=float(rng.choice([0.0, 0.3])), link_weight=0.5,
    )  # fmt: skip
    reserve = (float(rng.choice([0.0, 1.0])), 0.0, 0.0)
    return Problem(nodes, hosted, (demand,), latencies, bandwidths, reserve, parameters)


def cheapest(problem: Problem, most: int = 3) -> float:
    """The least cost of all placements that keep every rule; infinite where none does."""
    p, best = problem.parameters, math.inf
    needs = np.array([h.service.cpus for h in problem.services])
    for x in sorted(_tables(problem, most), key=lambda x: (float(needs @ x.sum(axis=1)), x.tolist())):
        rent = p.cpu_price * float(needs @ x.sum(axis=1)) + p.node_price * int((x.sum(axis=0) > 0).sum())
        if rent >= best:
            continue
        routed = flow_cost(problem, x)
        if rent + routed < best and all(share_after(problem, x, n) >= p.gamma - 1e-7 for n in range(len(problem.nodes))):
            best = rent + routed
    return best


def _tables(problem: Problem, most: int) -> Iterator[NDArray[np.float64]]:
    """Tables of replicas within capacity, diversity, sparsity and the reserve, with replicas enough on the whole."""
    p = problem.parameters
    needs = np.array([[h.service.cpus, h.service.memory_bytes / MIB] for h in problem.services])
    capacity = np.array([[n.cpus, n.memory_bytes / MIB] for n in problem.nodes])
    load = problem.demands[0].rate
    rows = []
    for hosted in problem.services:
        tries = [np.array(row, float) for row in itertools.product(range(most + 1), repeat=len(problem.nodes))]
        enough = load / (p.utilisation * hosted.throughput) - 1e-9
        rows.append([
            row for row in tries
            if row.sum() >= max(hosted.least, enough) and p.kappa <= (row > 0).sum() <= (p.most_nodes or len(row))
        ])  # fmt: skip
    for choice in itertools.product(*rows):
        x = np.array(choice)
        free = capacity - x.T @ needs
        if free.min() < -1e-9 or free[:, 0].sum() < problem.reserve[0] - 1e-9:
            continue
        if p.gamma and min(free[:, 0].sum() - free[n, 0] for n in range(len(free))) < p.gamma * problem.reserve[0] - 1e-9:
            continue
        yield x


def flow_cost(problem: Problem, x: NDArray[np.float64]) -> float:
    """Cheapest routing of all load: latency and the busiest link."""
    p = problem.parameters
    ways = list(_ways(problem, x, None))
    if not ways:
        return math.inf
    demand = problem.demands[0]
    cost = [p.latency_weight * demand.rate * sum(_hop_s(problem, *hop) for hop in hops) for _, hops in ways]
    below, limits = _loads(problem, x, ways, p.utilisation, busiest=True)
    found = linprog(
        [*cost, p.link_weight], A_ub=below, b_ub=limits, A_eq=[[1.0] * len(ways) + [0.0]], b_eq=[1.0],
        bounds=[(0, 1)] * len(ways) + [(0, p.link_share)],
    )  # fmt: skip
    return float(found.fun) if found.status == 0 else math.inf


def share_after(problem: Problem, x: NDArray[np.float64], lost: int) -> float:
    """Largest share of the load that can be served with a node gone, from the other entries, or all nodes alike."""
    left = [i for i in range(len(problem.nodes)) if i != lost]
    at = [i for i in left if problem.demands[0].entry.get(problem.nodes[i].name)]
    entries = at or left
    ways, owners = [], []
    for entry in entries:
        found = list(_ways(problem, x, lost, entry))
        ways += found
        owners += [entry] * len(found)
    if not ways:
        return 0.0
    below, limits = _loads(problem, x, ways, problem.parameters.utilisation_after_loss, busiest=False)
    below = [[*row, 0.0] for row in below]
    shares = [[float(owner == entry) for owner in owners] + [-1.0 / len(entries)] for entry in entries]
    found_share = linprog(
        [0.0] * len(ways) + [-1.0], A_ub=below, b_ub=limits, A_eq=shares, b_eq=[0.0] * len(entries),
        bounds=[(0, 1)] * (len(ways) + 1),
    )  # fmt: skip
    return float(-found_share.fun)


Way = tuple[dict[str, int], list[tuple[int, int, float]]]


def _ways(problem: Problem, x: NDArray[np.float64], lost: int | None, entry: int | None = None) -> Iterator[Way]:
    """Every way of serving a task in time: node of each visit, and its hops (u, v, bytes)."""
    demand = problem.demands[0]
    names = [node.name for node in problem.nodes]
    gate = names.index(next(iter(demand.entry))) if entry is None else entry
    open_at = [[n for n in range(len(names)) if x[int(v.service[1:]), n] > 0 and n != lost] for v in demand.visits]
    for nodes in itertools.product(*open_at):
        where = dict(zip([v.id for v in demand.visits], nodes, strict=True))
        hops = [(where.get(e.source or "", gate), where.get(e.target or "", gate), e.bytes_per_task) for e in demand.edges]
        if _duration_s(problem, demand, where, gate) <= demand.deadline_s + 1e-9:
            yield where, hops


def _duration_s(problem: Problem, demand: Demand, where: Mapping[str, int], gate: int) -> float:
    done: dict[str | None, float] = {None: 0.0}
    for visit in demand.visits:
        arrived = [
            done[e.source] + _hop_s(problem, where.get(e.source or "", gate), where[visit.id], e.bytes_per_task)
            for e in demand.edges if e.target == visit.id
        ]  # fmt: skip
        done[visit.id] = max(arrived) + 0.01
    return max(
        done[e.source] + _hop_s(problem, where[e.source or ""], gate, e.bytes_per_task)
        for e in demand.edges
        if e.target is None
    )


def _hop_s(problem: Problem, u: int, v: int, size: float) -> float:
    pair = (problem.nodes[u].name, problem.nodes[v].name)
    return 0.0 if u == v else problem.latencies_s[pair] + size / problem.bandwidths[pair]


def _loads(
    problem: Problem, x: NDArray[np.float64], ways: Sequence[Way], utilisation: float, *, busiest: bool
) -> tuple[list[list[float]], list[float]]:
    demand, rows, limits = problem.demands[0], [], []
    for visit in demand.visits:
        s = int(visit.service[1:])
        for n in range(len(problem.nodes)):
            rows.append([demand.rate * (where[visit.id] == n) for where, _ in ways] + [0.0] * busiest)
            limits.append(utilisation * problem.services[s].throughput * x[s, n])
    for (a, b), width in problem.bandwidths.items():
        u, v = ([node.name for node in problem.nodes].index(name) for name in (a, b))
        loads = [demand.rate * sum(size for f, t, size in hops if (f, t) == (u, v)) / width for _, hops in ways]
        rows.append(loads + [-1.0] * busiest)
        limits.append(0.0 if busiest else problem.parameters.link_share)
    return rows, limits
