"""Where the load goes under a given placement: a linear program, also with one node lost. Judges every placement alike.

    carried(f, x) = max sigma <= 1  so that  sigma of every demand's load  flows through the replicas x on the nodes but f

sigma is concave in x, so the program's dual prices give a cut that holds for every other x too (L-shaped method, Van Slyke and
Wets 1969): this is how `program` demands survival without a copy of all flows per node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from orchestrator.core import Placement
from orchestrator.placement.problem import EPSILON, Bools, Demand, Floats, Problem, in_time
from orchestrator.placement.staffing import targets

SHORTFALL = 1e-6
"""By so much a share carried may miss gamma, for the solver's tolerances."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What is left after a loss."""

    share: float
    """Of every demand, within its deadline; from 0, at most what was searched for."""
    prices: Floats
    """d share / d x[s, n] at this x, shape (s, n); >= 0, and 0 on the lost node."""


@dataclass(frozen=True, slots=True)
class Routed:
    """How the load flows best when nothing is lost."""

    latency_cost: float
    """omega * tasks on the way (Little's law: rate times time on links)."""
    busiest_link: float
    """Largest traffic / bandwidth."""
    links: Floats
    """Traffic [bytes/s], shape (n, n)."""
    tasks: Floats
    """Hops of tasks from node to node [1/s], shape (n, n); those that stay on a node on the diagonal."""


def carried(problem: Problem, x: Floats, lost: int, hosts: Bools | None = None, most: float = 1.0) -> Carried:
    """Share of the load that still flows when node `lost` is gone.

    Args:
        problem: with its parameters for the time after a loss.
        x: replicas, shape (s, n).
        lost: index of the node.
        hosts: where services may be, beside where they are: `prices` are right for these. Default: where x is.
        most: where the search for more ends; above 1 it finds how much the load could grow.
    """
    hosts = x > 0.5 if hosts is None else hosts
    rows = _Rows(problem, hosts, lost)
    sigma = rows.column(1, 0.0, most)[0]
    rows.cost[sigma] = -1.0
    for demand in problem.arrays.commodities(lost):
        rows.route(demand, sigma, 0.0)
    p = problem.parameters
    cells = rows.limit_services(p.utilisation_after_loss * problem.arrays.throughput[:, None] * x)
    rows.limit_links(p.link_share, None)
    result = rows.solve()
    prices = np.zeros_like(x)
    for row, (s, n) in cells.items():
        prices[s, n] = -result.ineqlin.marginals[row] * p.utilisation_after_loss * problem.arrays.throughput[s]
    return Carried(min(most, max(0.0, float(-result.fun))), prices)


def route(problem: Problem, x: Floats) -> Routed | None:
    """The cheapest flows of all load through these replicas; None where there are none."""
    p = problem.parameters
    rows = _Rows(problem, x > 0.5, None)
    one = rows.column(1, 1.0, 1.0)[0]
    busiest = rows.column(1, 0.0, p.link_share)[0]
    rows.cost[busiest] = p.link_weight
    for demand in problem.arrays.commodities():
        rows.route(demand, one, p.latency_weight)
    rows.limit_services(p.utilisation * problem.arrays.throughput[:, None] * x)
    rows.limit_links(p.link_share, busiest)
    result = rows.solve()
    if result.status != 0:
        return None
    links, tasks = np.zeros_like(problem.arrays.latency), np.zeros_like(problem.arrays.latency)
    for column, u, v, rate, size in rows.traffic:
        tasks[u, v] += rate * result.x[column]
        links[u, v] += rate * size * result.x[column]
    return Routed(float(result.fun - p.link_weight * result.x[busiest]), float(result.x[busiest]), links, tasks)


@dataclass(slots=True)
class _Rows:
    """A linear program under construction: min cost z, A_ub z <= b_ub, A_eq z = 0, bounds."""

    problem: Problem
    hosts: Bools
    lost: int | None
    cost: list[float] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)
    equal: list[tuple[int, int, float]] = field(default_factory=list)
    equal_rows: int = 0
    below: list[tuple[int, int, float]] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    work: list[tuple[int, int, int, float]] = field(default_factory=list)
    """(column, service, node, tasks/s per unit of the column)."""
    traffic: list[tuple[int, int, int, float, float]] = field(default_factory=list)
    """(column, from node, to node, tasks/s per unit of the column, bytes per task)."""

    def column(self, number: int, low: float, high: float) -> list[int]:
        """New variables between two bounds, at no cost."""
        first = len(self.cost)
        self.cost += [0.0] * number
        self.bounds += [(low, high)] * number
        return list(range(first, first + number))

    def route(self, demand: Demand, scale: int, weight: float) -> None:
        """Flows of one commodity along its DAG, as shares of it; column `scale` says how much, `weight` prices time on links.

        Conservation per visit and node; all parents of a visit bring equal shares to each node (the join rule).
        """
        arrays = self.problem.arrays
        entry = arrays.entry(demand)
        shares: dict[str, dict[int, int]] = {}
        for visit in demand.visits:
            s = arrays.service[visit.service]
            nodes = [int(n) for n in np.flatnonzero(self.hosts[s]) if n != self.lost]
            shares[visit.id] = dict(zip(nodes, self.column(len(nodes), 0.0, math.inf), strict=True))
            self.work += [(column, s, n, demand.rate) for n, column in shares[visit.id].items()]
        ends = {int(n): 0 for n in np.flatnonzero(entry > 0)}
        allowed = in_time(self.problem, demand, self.hosts, self.lost)
        for edge, pairs in zip(demand.edges, allowed, strict=True):
            sources = ends if edge.source is None else shares[edge.source]
            targets = ends if edge.target is None else shares[edge.target]
            way = arrays.link_s(edge)
            out: dict[int, list[int]] = {u: [] for u in sources}
            into: dict[int, list[int]] = {v: [] for v in targets}
            for u in sources:
                for v in targets:
                    if pairs[u, v]:
                        column = self.column(1, 0.0, math.inf)[0]
                        self.cost[column] = weight * demand.rate * way[u, v]
                        self.traffic.append((column, u, v, demand.rate, edge.bytes_per_task))
                        out[u].append(column)
                        into[v].append(column)
            for columns, end, side in ((out, edge.source, sources), (into, edge.target, targets)):
                for node, flows in columns.items():
                    column, factor = (scale, float(entry[node])) if end is None else (side[node], 1.0)
                    self.equal += [(self.equal_rows, flow, 1.0) for flow in flows]
                    self.equal.append((self.equal_rows, column, -factor))
                    self.equal_rows += 1

    def limit_services(self, capacity: Floats) -> dict[int, tuple[int, int]]:
        """Work of each service on each node within its capacity [tasks/s]; returns row -> (service, node)."""
        cells: dict[tuple[int, int], int] = {}
        for column, s, n, per_unit in self.work:
            if (s, n) not in cells:
                cells[s, n] = len(self.limits)
                self.limits.append(float(capacity[s, n]))
            self.below.append((cells[s, n], column, per_unit))
        return {row: cell for cell, row in cells.items()}

    def limit_links(self, share: float, busiest: int | None) -> None:
        """Traffic of each link and direction within its share of the bandwidth; column `busiest` is the largest share."""
        bandwidth = self.problem.arrays.bandwidth
        lines: dict[tuple[int, int], int] = {}
        for column, u, v, rate, size in self.traffic:
            if not np.isfinite(bandwidth[u, v]):
                continue
            if (u, v) not in lines:
                lines[u, v] = len(self.limits)
                self.limits.append(0.0 if busiest is not None else share)
                if busiest is not None:
                    self.below.append((lines[u, v], busiest, -1.0))
            self.below.append((lines[u, v], column, rate * size / bandwidth[u, v]))

    def solve(self) -> Any:
        """HiGHS's answer, as scipy gives it."""
        columns = len(self.cost)
        return linprog(
            self.cost, bounds=self.bounds, method="highs",
            A_ub=_sparse(self.below, len(self.limits), columns) if self.limits else None, b_ub=self.limits or None,
            A_eq=_sparse(self.equal, self.equal_rows, columns) if self.equal_rows else None,
            b_eq=np.zeros(self.equal_rows) if self.equal_rows else None,
        )  # fmt: skip


def _sparse(entries: list[tuple[int, int, float]], rows: int, columns: int) -> coo_array:
    i, j, values = zip(*entries, strict=True) if entries else ((), (), ())
    return coo_array((np.array(values, float), (np.array(i, int), np.array(j, int))), shape=(rows, columns)).tocsr()


def survivors(problem: Problem, x: Floats) -> dict[str, float]:
    """Node -> share of every demand still carried once that node is lost.

    A node where nothing stands and nothing enters takes nothing along: one of them is routed for all.
    """
    entering = {node for demand in problem.demands for node, share in demand.entry.items() if share > 0}
    idle = [n for n, node in enumerate(problem.nodes) if node.name not in entering and (x[:, n] < 0.5).all()]
    left = {n: carried(problem, x, n).share for n in range(len(problem.nodes)) if n not in idle[1:]}
    return {node.name: left[idle[0] if n in idle else n] for n, node in enumerate(problem.nodes)}


def cost_of(problem: Problem, x: Floats, current: Placement | None = None) -> float:
    """The objective of any placement; infinite where its replicas cannot carry the load."""
    p, arrays = problem.parameters, problem.arrays
    routed = route(problem, x)
    if routed is None:
        return float("inf")
    old = arrays.counts(current) if current is not None else np.zeros_like(x)
    rented = p.cpu_price * float(arrays.needs[:, 0] @ x.sum(axis=1)) + p.node_price * float((x.sum(axis=0) > 0).sum())
    moved = p.move_price * float(np.maximum(x - old, 0).sum()) + p.drop_price * float(np.maximum(old - x, 0).sum())
    return rented + moved + routed.latency_cost + p.link_weight * routed.busiest_link


def least_rent(problem: Problem) -> float:
    """What the cores of the replicas cost at least [cost units/s]: fewer are too few for the load, kappa or a loss."""
    p, arrays = problem.parameters, problem.arrays
    wanted = targets(problem)
    return p.cpu_price * sum(float(arrays.needs[s, 0]) * wanted[name].replicas for name, s in arrays.service.items())


def keeps(problem: Problem, x: Floats, left: Mapping[str, float]) -> bool:
    """Whether a placement keeps every rule of the program.

    Args:
        problem: with the rules.
        x: replicas, shape (s, n).
        left: what every loss leaves of it, of `survivors`.
    """
    p, arrays = problem.parameters, problem.arrays
    nodes, free, reserve = (x > 0.5).sum(axis=1), arrays.capacity - x.T @ arrays.needs, np.array(problem.reserve)
    used, rent = int((x.sum(axis=0) > 0.5).sum()), p.cpu_price * float(arrays.needs[:, 0] @ x.sum(axis=1))
    return bool(
        fits(problem, x)
        and (x.sum(axis=1) >= arrays.need).all()
        and (nodes >= p.kappa).all()
        and (p.most_nodes is None or (nodes <= p.most_nodes).all())
        and (p.most_nodes_in_all is None or used <= p.most_nodes_in_all)
        and (p.budget is None or rent <= p.budget + EPSILON)
        and (free.sum(axis=0) >= reserve - EPSILON).all()
        and (free.sum(axis=0) - free >= p.gamma * reserve - EPSILON).all()
        and all(share >= p.gamma - SHORTFALL for share in left.values())
        and route(problem, x) is not None
    )


def fits(problem: Problem, x: Floats) -> bool:
    """Whether the replicas fit the nodes, and stand only where they may."""
    arrays = problem.arrays
    return bool((x.T @ arrays.needs <= arrays.capacity + EPSILON * 1e3).all() and not x[~arrays.allowed].any())
