"""The integer program of the core tier as cvxpy reads it: variables, every rule as a function, and the objective.

    min  sum price_s x + node_price sum used + omega sum rate_k z link_s + phi busiest + move [x - old]^+ + drop [old - x]^+

Variables: x[s, n] integer, present[s, n] and used[n] binary; for each demand k, share[k, i][n] of visit i served on node n and
flow z[k, e][u, v] over edge e. Formulation: the core placement of arXiv 2601.19563 (eq. (14)) with network flows, diversity and
survival in place of its scores. Each constraint is a function below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import cvxpy as cp
import numpy as np
from scipy.sparse import csr_array

from orchestrator.core import Placement
from orchestrator.placement.problem import (
    EPSILON,
    RESOURCES,
    Bools,
    Demand,
    Edge,
    Floats,
    Problem,
    Strain,
    in_time,
    whole,
)

TIE = 1e-7
"""Price of a replica's node number, as a share of the mean replica price: among equals the earlier node wins."""


@dataclass(frozen=True, slots=True)
class Row:
    """A rule that may be relaxed: excess <= 0, element by element."""

    rule: str
    subjects: tuple[str, ...]
    """One for each element of the excess, in C order."""
    excess: cp.Expression
    scale: float | Floats
    """What one unit of relaxation is, in terms of the excess."""
    unit: str


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """strain.load <= share + sum prices (x - at), for a node whose loss would leave too little."""

    lost: int
    strain: Strain
    share: float
    prices: Floats
    at: Floats


@dataclass(slots=True)
class Model:
    """The variables and parameters of one program."""

    problem: Problem
    hosts: Bools
    """hosts[s, n]: whether replicas of s on n are considered."""
    relaxed: bool = False
    """Replicas in fractions: the linear relaxation."""
    commodities: tuple[Demand, ...] = field(init=False)
    x: cp.Variable = field(init=False)
    present: cp.Variable = field(init=False)
    used: cp.Variable = field(init=False)
    busiest: cp.Variable = field(init=False)
    extra: cp.Variable = field(init=False)
    """Capacity beyond a node's own; 0 but in the elastic form."""
    moved: cp.Variable = field(init=False)
    dropped: cp.Variable = field(init=False)
    rates: cp.Parameter = field(init=False)
    steepness: cp.Parameter = field(init=False)
    """steepness[s, k]: of `rounding`, per share of commodity k's visit [replicas]."""
    room: cp.Parameter = field(init=False)
    """room[s]: of `rounding` [replicas]."""
    need: cp.Parameter = field(init=False)
    need_after_loss: cp.Parameter = field(init=False)
    most: cp.Parameter = field(init=False)
    current: cp.Parameter = field(init=False)
    lowest: cp.Parameter = field(init=False)
    highest: cp.Parameter = field(init=False)
    """lowest <= x <= highest: 0 and most, but while only a few replicas or places are looked at."""
    shares: list[dict[str, cp.Variable]] = field(default_factory=list)
    links: list[list[cp.Variable]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make them all."""
        s, n = self.hosts.shape
        one = {"bounds": [0, 1]} if self.relaxed else {"boolean": True}
        self.x = cp.Variable((s, n), integer=not self.relaxed)
        self.present = cp.Variable((s, n), **one)
        self.used = cp.Variable(n, **one)
        self.busiest = cp.Variable(nonneg=True)
        self.extra = cp.Variable((n, len(RESOURCES)), nonneg=True)
        self.moved = cp.Variable((s, n), nonneg=True)
        self.dropped = cp.Variable((s, n), nonneg=True)
        self.commodities = self.problem.arrays.commodities()
        self.rates = cp.Parameter(len(self.commodities), nonneg=True)
        self.steepness = cp.Parameter((s, len(self.commodities)), nonneg=True)
        self.room = cp.Parameter(s, nonneg=True)
        self.need = cp.Parameter(s, nonneg=True)
        self.need_after_loss = cp.Parameter(s, nonneg=True)
        self.most = cp.Parameter(s, nonneg=True)
        self.current = cp.Parameter((s, n), nonneg=True)
        self.lowest, self.highest = cp.Parameter((s, n), nonneg=True), cp.Parameter((s, n), nonneg=True)
        for demand in self.commodities:
            self.shares.append({v.id: cp.Variable(len(self.at(v.service)), nonneg=True) for v in demand.visits})
            self.links.append([cp.Variable((len(self.ends(k, e.source)), len(self.ends(k, e.target))), nonneg=True)
                               for k in [len(self.shares) - 1] for e in demand.edges])  # fmt: skip

    def at(self, service: str) -> list[int]:
        """Candidate nodes of a service."""
        return [int(n) for n in np.flatnonzero(self.hosts[self.problem.arrays.service[service]])]

    def ends(self, k: int, visit: str | None) -> list[int]:
        """Nodes at one end of an edge: a visit's candidates, or where tasks enter and leave."""
        demand = self.commodities[k]
        if visit is None:
            return [int(n) for n in np.flatnonzero(self.problem.arrays.entry(demand) > 0)]
        return self.at(next(v.service for v in demand.visits if v.id == visit))

    def visits(self, service: str) -> list[tuple[int, cp.Variable]]:
        """Every visit at a service: (k of its commodity, shares by candidate node)."""
        return [(k, self.shares[k][v.id]) for k, d in enumerate(self.commodities) for v in d.visits if v.service == service]

    def edges(self) -> list[tuple[int, Demand, int, cp.Variable]]:
        """Every edge of every commodity: (k, commodity, e, flow)."""
        return [(k, d, e, self.links[k][e]) for k, d in enumerate(self.commodities) for e in range(len(d.edges))]

    def set(self, problem: Problem, current: Placement | None) -> None:
        """Parameters of one solve: demand and what runs."""
        arrays = problem.arrays
        self.rates.value = np.array([demand.rate for demand in arrays.commodities()])
        each = self.rates.value / (problem.parameters.utilisation * arrays.throughput[:, None])
        total = np.array([sum(each[s, k] for k, _ in self.visits(name)) for name, s in arrays.service.items()])
        part = total - whole(total) + 1.0
        self.steepness.value, self.room.value = each / part[:, None], np.maximum(0.0, total / part - whole(total))
        self.need.value, self.need_after_loss.value = arrays.need, arrays.need_after_loss
        self.current.value = arrays.counts(current) if current is not None else np.zeros(self.hosts.shape)
        self.most.value = np.maximum.reduce([arrays.need, arrays.need_after_loss, self.current.value.max(axis=1, initial=0)])
        self.within(self.hosts)

    def within(self, places: Bools, fixed: Floats | None = None) -> None:
        """Look at these places only; services of which `fixed` has a number (not nan) stay as it says."""
        self.lowest.value, self.highest.value = np.zeros(places.shape), places * self.most.value[:, None]
        if fixed is not None:
            self.lowest.value = np.where(np.isnan(fixed), self.lowest.value, fixed)
            self.highest.value = np.where(np.isnan(fixed), self.highest.value, fixed)


# --- constraints that always hold -----------------------------------------------------------------------------------------


def conservation(m: Model) -> list[cp.Constraint]:
    """Flow out of each node along each edge is the share served there, and so is the flow in (which is also the join rule)."""
    found: list[cp.Constraint] = []
    for k, demand, e, z in m.edges():
        for end, axis in ((demand.edges[e].source, 1), (demand.edges[e].target, 0)):
            entry = m.problem.arrays.entry(demand)[m.ends(k, None)]
            found.append(cp.sum(z, axis=axis) == (entry if end is None else m.shares[k][end]))
    return found


def support(m: Model) -> list[cp.Constraint]:
    """Present <= x <= most present; x between lowest and highest; a node with anything on it is used."""
    return [
        m.x >= m.present,
        m.x <= cp.diag(m.most) @ m.present,
        m.x >= m.lowest,
        m.x <= m.highest,
        m.present <= np.ones((m.hosts.shape[0], 1)) @ cp.reshape(m.used, (1, m.hosts.shape[1]), order="C"),
    ]


def service(m: Model) -> list[cp.Constraint]:
    """Work on each node within its replicas' rate, rate_k share <= rho throughput x; and a share only where one is present."""
    a, p = m.problem.arrays, m.problem.parameters
    found: list[cp.Constraint] = []
    for name, s in a.service.items():
        at = m.at(name)
        visits = m.visits(name)
        if visits and at:
            work = sum(m.rates[k] * share for k, share in visits)
            found.append(work / (p.utilisation * a.throughput[s]) <= m.x[s, at])
            found += [share <= m.present[s, at] for _, share in visits]
    return found


def rounding(m: Model) -> list[cp.Constraint]:
    """What whole replicas mean for every set A of nodes at once; cuts off only replicas in fractions.

    The replicas in A are whole, and no fewer than the work y(A) there asks for. With W all work of the service in replicas and
    f = W - ceil(W) + 1: x(A) >= ceil(W) - (W - y(A)) / f (mixed-integer rounding, Nemhauser and Wolsey 1990). The strictest
    set is that of the nodes where y / f > x, so sum_n [y[n] / f - x[n]]^+ <= W / f - ceil(W) says it of all of them.
    """
    found: list[cp.Constraint] = []
    for name, s in m.problem.arrays.service.items():
        at, visits = m.at(name), m.visits(name)
        if visits and at:
            over = cp.Variable(len(at), nonneg=True)
            found.append(sum(m.steepness[s, k] * share for k, share in visits) - m.x[s, at] <= over)
            found.append(cp.sum(over) <= m.room[s])
    return found


def moves(m: Model) -> list[cp.Constraint]:
    """Moved >= x - current and dropped >= current - x."""
    return [m.moved >= m.x - m.current, m.dropped >= m.current - m.x]


def order(m: Model, pairs: Sequence[tuple[int, int]]) -> list[cp.Constraint]:
    """Of interchangeable nodes the earlier one has at least as many replicas: one of many equal placements is enough."""
    return [cp.sum(m.x[:, a]) >= cp.sum(m.x[:, b]) for a, b in pairs]


def unbroken(m: Model, pairs: Sequence[tuple[int, int]]) -> list[cp.Constraint]:
    """All of these."""
    return [*conservation(m), *support(m), *service(m), *rounding(m), *moves(m), *order(m, pairs)]


# --- rules that the elastic form may relax --------------------------------------------------------------------------------


def capacity(m: Model) -> list[Row]:
    """Every resource of every node: sum_s needs[s, r] x[s, n] <= capacity[n, r] (+ extra[n, r] in the elastic form)."""
    a = m.problem.arrays
    found = []
    for r, unit in enumerate(RESOURCES):
        if a.needs[:, r].any() or m.problem.reserve[r]:
            subjects = tuple(f"{unit} of {node}" for node in a.node)
            scale = a.capacity[:, r].max(initial=0) or 1.0
            found.append(Row("capacity", subjects, a.needs[:, r] @ m.x - a.capacity[:, r] - m.extra[:, r], scale, unit))
    return found


def replicas(m: Model) -> list[Row]:
    """Enough replicas for the load, rounded up: sum_n x >= need."""
    return [Row("replicas", tuple(m.problem.arrays.service), m.need - cp.sum(m.x, axis=1), 1.0, "replicas")]


def diversity(m: Model) -> list[Row]:
    """Every service on at least kappa nodes."""
    kappa = m.problem.parameters.kappa
    return [Row("diversity", tuple(m.problem.arrays.service), kappa - cp.sum(m.present, axis=1), 1.0, "nodes")]


def sparsity(m: Model) -> list[Row]:
    """Every service on at most so many nodes, and so many nodes used in all."""
    p, found = m.problem.parameters, []
    if p.most_nodes is not None:
        excess = cp.sum(m.present, axis=1) - p.most_nodes
        found.append(Row("sparsity", tuple(m.problem.arrays.service), excess, 1.0, "nodes"))
    if p.most_nodes_in_all is not None:
        excess = cp.reshape(cp.sum(m.used) - p.most_nodes_in_all, (1,), order="C")
        found.append(Row("sparsity", ("nodes in all",), excess, 1.0, "nodes"))
    return found


def budget(m: Model) -> list[Row]:
    """The cores of all replicas within the budget."""
    p, a = m.problem.parameters, m.problem.arrays
    if p.budget is None:
        return []
    excess = cp.reshape(cp.sum((p.cpu_price * a.needs[:, 0]) @ m.x) - p.budget, (1,), order="C")
    return [Row("budget", ("all replicas",), excess, max(p.budget, EPSILON), "per second")]


def survival(m: Model) -> list[Row]:
    """Whatever node is lost, enough replicas are left: sum_{v != f} x[s, v] >= need_after_loss[s]; cuts do the rest."""
    a = m.problem.arrays
    if not m.problem.parameters.gamma:
        return []
    return [
        Row("survival", tuple(f"{s} without {node}" for s in a.service),
            m.need_after_loss - cp.sum(m.x, axis=1) + m.x[:, n], 1.0, "replicas")
        for node, n in a.node.items()
    ]  # fmt: skip


def survival_cuts(m: Model, cuts: Sequence[Cut]) -> list[Row]:
    """What losses found too hard allow: load <= share + sum prices (x - at)."""
    names, found = list(m.problem.arrays.node), []
    for cut in cuts:
        gained = cp.sum(cp.multiply(cut.prices, m.x)) - float((cut.prices * cut.at).sum())
        excess = cp.reshape(cut.strain.load - cut.share - gained, (1,), order="C")
        found.append(Row("survival", (f"load carried without {names[cut.lost]}",), excess, 1.0, "of the load"))
    return found


def reserve(m: Model) -> list[Row]:
    """Room for the light services, and for gamma of it when any node is lost."""
    a, gamma, found = m.problem.arrays, m.problem.parameters.gamma, []
    for r, unit in enumerate(RESOURCES):
        asked = m.problem.reserve[r]
        if asked <= 0:
            continue
        free = a.capacity[:, r] + m.extra[:, r] - a.needs[:, r] @ m.x
        rest = a.capacity[:, r].max()
        found.append(Row("light reserve", (f"{unit} in all",), cp.reshape(asked - cp.sum(free), (1,), order="C"), rest, unit))
        if gamma:
            subjects = tuple(f"{unit} without {node}" for node in a.node)
            found.append(Row("light reserve", subjects, gamma * asked - cp.sum(free) + free, rest, unit))
    return found


def bandwidth(m: Model) -> list[Row]:
    """Traffic of each link and direction within its share; none above the busiest, which the objective charges."""
    a, p = m.problem.arrays, m.problem.parameters
    pairs = {(int(u), int(v)): i for i, (u, v) in enumerate(np.argwhere(np.isfinite(a.bandwidth)))}
    parts = []
    for k, demand, e, z in m.edges():
        per_task = _hops(m, k, demand.edges[e], pairs)
        if per_task.nnz:
            parts.append(m.rates[k] * (per_task @ cp.vec(z, order="C")))
    if not parts:
        return []
    names, loads = list(a.node), sum(parts)
    subjects = tuple(f"{names[u]} -> {names[v]}" for u, v in pairs)
    return [
        Row("bandwidth", subjects, loads - p.link_share, 1.0, "of the bandwidth"),
        Row("busiest link", subjects, loads - m.busiest, 0.0, "of the bandwidth"),
    ]


def _hops(m: Model, k: int, edge: Edge, pairs: Mapping[tuple[int, int], int]) -> csr_array:
    """What one task of an edge takes of each link, by the links' rows and the flow's elements: bytes over bandwidth."""
    sources, targets = m.ends(k, edge.source), m.ends(k, edge.target)
    size, width = edge.bytes_per_task, m.problem.arrays.bandwidth
    ways = [(i, u, j, v) for i, u in enumerate(sources) for j, v in enumerate(targets) if size and (u, v) in pairs]
    cells = [(pairs[u, v], i * len(targets) + j, size / width[u, v]) for i, u, j, v in ways]
    rows, columns, values = zip(*cells, strict=True) if cells else ((), (), ())
    return csr_array((np.array(values, float), (np.array(rows, int), np.array(columns, int))),
                     shape=(len(pairs), len(sources) * len(targets)))  # fmt: skip


def deadlines(m: Model) -> list[Row]:
    """No flow over node pairs through which no task can be in time (`problem.in_time`)."""
    found = []
    for k, demand in enumerate(m.commodities):
        late = []
        for z, edge, pairs in zip(m.links[k], demand.edges, in_time(m.problem, demand, m.hosts), strict=True):
            missed = ~pairs[np.ix_(m.ends(k, edge.source), m.ends(k, edge.target))]
            if missed.any():
                late.append(cp.sum(cp.multiply(missed.astype(float), z)))
        if late:
            excess = cp.reshape(sum(late), (1,), order="C")
            found.append(Row("deadline", (demand.name,), excess, 1.0, "late hops per task"))
    return found


RULES: tuple[Callable[[Model], list[Row]], ...] = (
    capacity, replicas, diversity, sparsity, budget, survival, reserve, bandwidth, deadlines,
)  # fmt: skip
"""Every rule that may be relaxed, but for the cuts."""


# --- objective ------------------------------------------------------------------------------------------------------------


def objective(m: Model) -> cp.Expression:
    """What the placement costs per second; see the module."""
    p = m.problem.parameters
    price = p.cpu_price * m.problem.arrays.needs[:, 0]
    terms = [cp.sum(price @ m.x), p.node_price * cp.sum(m.used), p.link_weight * m.busiest]
    terms += [p.move_price * cp.sum(m.moved), p.drop_price * cp.sum(m.dropped)]
    for k, demand, e, z in m.edges():
        edge = demand.edges[e]
        way = m.problem.arrays.link_s(edge)[np.ix_(m.ends(k, edge.source), m.ends(k, edge.target))]
        if way.any():
            terms.append(p.latency_weight * m.rates[k] * cp.sum(cp.multiply(way, z)))
    return sum(terms)


def ties(m: Model) -> cp.Expression:
    """Next to nothing per replica and node number, so that equal placements do not come out by chance."""
    price = float(np.mean(m.problem.parameters.cpu_price * m.problem.arrays.needs[:, 0])) or 1.0
    return TIE * price * cp.sum(m.x @ np.arange(m.hosts.shape[1]))


# --- solving --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compiled:
    """A program before any cut."""

    fixed: list[cp.Constraint]
    rows: list[Row]
    cost: cp.Expression
    task: cp.Problem

    @classmethod
    def of(cls, m: Model, pairs: Sequence[tuple[int, int]]) -> Compiled:
        """The program of a model whose parameters are set, with the pairs of nodes that are interchangeable."""
        fixed, cost = [*unbroken(m, pairs), m.extra == 0], objective(m)
        rows = [row for rule in RULES for row in rule(m)]
        return cls(fixed, rows, cost, cp.Problem(cp.Minimize(cost + ties(m)), [*fixed, *(row.excess <= 0 for row in rows)]))

    def with_cuts(self, m: Model, cuts: Sequence[Row]) -> cp.Problem:
        """The same with more rules."""
        rows = [*self.rows, *cuts]
        return (
            cp.Problem(cp.Minimize(self.cost + ties(m)), [*self.fixed, *(row.excess <= 0 for row in rows)])
            if cuts
            else self.task
        )
