"""The integer program of the core tier: replicas x[s, n] at the least cost, so that any single node may be lost.

    min  sum price_s x + node_price sum used + omega sum rate_k z link_s + phi busiest + move [x - old]^+ + drop [old - x]^+

Variables: x[s, n] integer, present[s, n] and used[n] binary; for each demand k, share[k, i][n] of visit i served on node n and
flow z[k, e][u, v] over edge e. Formulation: the core placement of arXiv 2601.19563 (eq. (14)) with network flows, diversity and
survival in place of its scores. Each constraint is a function below.

Survival is exact and lazy: the program starts with a capacity row per service and lost node, then `flows.carried` routes what
is left after each loss; every loss that carries less than gamma adds a cut, and the program is solved again until all hold.

Elastic form: every rule may be broken at a price per unit, which gives the smallest relaxation where nothing is feasible.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import cvxpy as cp
import numpy as np
from scipy.sparse import csr_array

from orchestrator.core import Placement, Target
from orchestrator.errors import EspalierError, Infeasible
from orchestrator.placement import flows, heuristics
from orchestrator.placement.flows import SHORTFALL
from orchestrator.placement.problem import EPSILON, RESOURCES, Bools, Demand, Edge, Floats, Problem, Strain, in_time

Status = Literal["optimal", "incumbent", "greedy", "spread"]
"""Within the gap asked for; at the time limit the best that was found, or a heuristic's, whichever is cheapest."""
State = Literal["found", "infeasible", "nothing"]
"""Of one run of the solver: a placement, the proof that there is none, or neither within the time."""
TIE = 1e-7
"""Price of a replica's node number, as a share of the mean replica price: among equals the earlier node wins."""
PRUNE_ABOVE, PRUNE_FACTOR = 12, 3.0
"""With more nodes than that only candidates are considered: at least so many, with so many times the room that is needed."""
NARROW_SHARE, SUPPORT = 0.4, 1e-4
"""Share of the time for the program where the relaxation has replicas; and what of one counts there."""


class SolverFailed(EspalierError):
    """The solver gave up for a reason of its own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the program may take, and how good it must be."""

    time_s: float = 60.0
    gap: float = 0.01
    """Largest (cost - bound) / cost at which it stops."""
    rounds: int = 50
    """Most times that it is solved with more cuts."""


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One rule of the smallest relaxation."""

    rule: str
    subject: str
    amount: float
    unit: str


@dataclass(frozen=True, slots=True)
class Solution:
    """What the program found, and how sure it is."""

    placement: Placement
    status: Status
    cost: float
    """The objective [cost units/s]."""
    bound: float | None
    """No placement among the candidates costs less; None where it is not known."""
    solve_s: float
    rounds: int
    cuts: tuple[str, ...]
    """Lost nodes that made cuts, in order."""
    carried: dict[str, float]
    """Lost node -> share still carried."""
    binding: tuple[tuple[str, str], ...]
    """Rules without slack: (rule, subject)."""

    @property
    def gap(self) -> float | None:
        """(cost - bound) / cost."""
        if self.bound is None:
            return None
        return max(0.0, self.cost - self.bound) / max(abs(self.cost), EPSILON)


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
    need: cp.Parameter = field(init=False)
    need_after_loss: cp.Parameter = field(init=False)
    most: cp.Parameter = field(init=False)
    current: cp.Parameter = field(init=False)
    open: cp.Parameter = field(init=False)
    """Where replicas may be now, of the candidates; all of them but while only a few are looked at."""
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
        self.need = cp.Parameter(s, nonneg=True)
        self.need_after_loss = cp.Parameter(s, nonneg=True)
        self.most = cp.Parameter(s, nonneg=True)
        self.current = cp.Parameter((s, n), nonneg=True)
        self.open = cp.Parameter((s, n), nonneg=True, value=self.hosts.astype(float))
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

    def edges(self) -> list[tuple[int, Demand, int, cp.Variable]]:
        """Every edge of every commodity: (k, commodity, e, flow)."""
        return [(k, d, e, self.links[k][e]) for k, d in enumerate(self.commodities) for e in range(len(d.edges))]

    def set(self, problem: Problem, current: Placement | None) -> None:
        """Parameters of one solve: demand and what runs."""
        arrays = problem.arrays
        self.rates.value = np.array([demand.rate for demand in arrays.commodities()])
        self.need.value, self.need_after_loss.value = arrays.need, arrays.need_after_loss
        self.current.value = arrays.counts(current) if current is not None else np.zeros(self.hosts.shape)
        self.most.value = np.maximum.reduce([arrays.need, arrays.need_after_loss, self.current.value.max(axis=1, initial=0)])


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
    """Present <= x <= most present; nothing outside what is open; a node with anything on it is used."""
    return [
        m.x >= m.present,
        m.x <= cp.diag(m.most) @ m.present,
        m.present <= m.open,
        m.present <= np.ones((m.hosts.shape[0], 1)) @ cp.reshape(m.used, (1, m.hosts.shape[1]), order="C"),
    ]


def service(m: Model) -> list[cp.Constraint]:
    """Work on each node within its replicas' rate, rate_k share <= rho throughput x; and a share only where one is present."""
    a, p = m.problem.arrays, m.problem.parameters
    found: list[cp.Constraint] = []
    for name, s in a.service.items():
        at = m.at(name)
        visits = [(k, m.shares[k][v.id]) for k, d in enumerate(m.commodities) for v in d.visits if v.service == name]
        if visits and at:
            work = sum(m.rates[k] * share for k, share in visits)
            found.append(work / (p.utilisation * a.throughput[s]) <= m.x[s, at])
            found += [share <= m.present[s, at] for _, share in visits]
    return found


def moves(m: Model) -> list[cp.Constraint]:
    """Moved >= x - current and dropped >= current - x."""
    return [m.moved >= m.x - m.current, m.dropped >= m.current - m.x]


def order(m: Model, pairs: Sequence[tuple[int, int]]) -> list[cp.Constraint]:
    """Of interchangeable nodes the earlier one has at least as many replicas: one of many equal placements is enough."""
    return [cp.sum(m.x[:, a]) >= cp.sum(m.x[:, b]) for a, b in pairs]


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
        fixed, cost = [*conservation(m), *support(m), *service(m), *moves(m), *order(m, pairs), m.extra == 0], objective(m)
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


class Program:
    """A problem's structure, compiled once; demand and what runs are parameters, set per solve."""

    def __init__(self, problem: Problem, limits: Limits | None = None, *, prune: bool = True) -> None:
        self.problem = problem
        self.limits = limits or Limits()
        self.model = Model(problem, candidates(problem) if prune else problem.arrays.allowed)
        self._compiled: dict[tuple[tuple[int, int], ...], Compiled] = {}
        """By the pairs of nodes that are interchangeable: what runs may tell them apart."""
        self._cuts: list[Cut] = []
        """Of all solves at the problem's own rates so far."""

    def solve(
        self,
        current: Placement | None = None,
        rates: Sequence[float] | None = None,
        strains: Mapping[str, Strain] | None = None,
        limits: Limits | None = None,
    ) -> Solution:
        """The cheapest placement that keeps every rule.

        Args:
            current: what runs; moving it costs what the parameters say. Where it stands counts among the candidates.
            rates: demand [tasks/s] in the problem's order, > 0; default: the problem's own.
            strains: lost node -> what is asked after that loss, beside what the parameters ask after each. Where it is
                given, even empty, the heuristics have no part in the answer, and no relaxation is looked for.
            limits: of this solve; default: the program's own.

        Raises:
            Infeasible: no placement keeps every rule; the message tells the smallest relaxation.
            SolverFailed: the solver gave up.
        """
        problem = self.problem if rates is None else _with_rates(self.problem, rates)
        self._consider(problem.arrays.counts(current) > 0 if current is not None else np.zeros_like(problem.arrays.allowed))
        self.model.set(problem, current)
        alone, strains = strains is not None, strains or {}
        pairs = tuple(interchangeable(problem, self.model.hosts, self.model.current.value, strains))
        if pairs not in self._compiled:
            self._compiled[pairs] = Compiled.of(self.model, pairs)
        known, limits = self._known(strains) if rates is None else [], limits or self.limits
        relaxed = self._relaxed(problem, current, limits, known) if self.model.hosts.shape[1] > PRUNE_ABOVE else None
        found, cuts = _search(problem, self.model, self._compiled[pairs], limits, strains, known, relaxed)
        self._cuts = self._cuts if rates is not None else list(dict.fromkeys([*self._cuts, *cuts]))
        if isinstance(found, Solution):
            beaten = found.status == "incumbent" and not alone
            return at_the_limit(problem, found, found.solve_s, current) if beaten else found
        if alone:
            raise Infeasible(f"no placement was found that carries what is asked of losses: {', '.join(strains) or 'any'}")
        if found == "infeasible" and (self.model.hosts != problem.arrays.allowed).any():
            return Program(problem, self.limits, prune=False).solve(current)
        if found == "infeasible":
            raise Infeasible(told(relax(problem, self.limits)))
        return at_the_limit(problem, None, self.limits.time_s, current)

    def _relaxed(self, problem: Problem, current: Placement | None, limits: Limits, known: Sequence[Cut]) -> Relaxed | None:
        """The linear relaxation; None where it was not solved in time."""
        linear = Model(self.problem, self.model.hosts, relaxed=True)
        linear.set(problem, current)
        task = Compiled.of(linear, ()).with_cuts(linear, survival_cuts(linear, known))
        if _run(task, limits.time_s, limits.gap) != "found":
            return None
        return Relaxed(float(task.value), _support(self.problem, linear, current), float(task.solver_stats.solve_time))

    def _known(self, strains: Mapping[str, Strain]) -> list[Cut]:
        """Cuts found earlier that hold now too: those of losses that were asked for no more than they are asked for now."""
        asked = [strains.get(node.name, Strain(self.problem.parameters.gamma)) for node in self.problem.nodes]
        return [
            cut
            for cut in self._cuts
            if cut.strain.load <= asked[cut.lost].load and cut.strain.deadline >= asked[cut.lost].deadline
        ]

    def _consider(self, running: Bools) -> None:
        """Make the nodes where something runs candidates too."""
        more = self.model.hosts | (running & self.problem.arrays.allowed)
        if (more != self.model.hosts).any():
            self.model = Model(self.problem, more)
            self._compiled.clear()
            self._cuts.clear()


def _with_rates(problem: Problem, rates: Sequence[float]) -> Problem:
    return replace(problem, demands=tuple(replace(d, rate=r) for d, r in zip(problem.demands, rates, strict=True)))


@dataclass(frozen=True, slots=True)
class Relaxed:
    """What the linear relaxation says."""

    bound: float
    """No placement among the candidates costs less."""
    support: Bools
    """Where it has anything, and a few places more."""
    spent_s: float

    def enough(self, gap: float) -> float:
        """What costs no more than this is within the gap of every placement."""
        return self.bound / (1.0 - gap) if self.bound > 0.0 and gap < 1.0 else -math.inf


def _search(
    problem: Problem,
    m: Model,
    compiled: Compiled,
    limits: Limits,
    strains: Mapping[str, Strain],
    known: Sequence[Cut],
    relaxed: Relaxed | None,
) -> tuple[Solution | Literal["infeasible", "out of time"], list[Cut]]:
    """Solve, look at every loss, cut, and solve again; also returns the cuts, the known ones among them."""
    spent, cuts = relaxed.spent_s if relaxed is not None else 0.0, list(known)
    names = [node.name for node in problem.nodes]
    for number in range(1, limits.rounds + 1):
        if spent >= limits.time_s:
            break
        cut_rows = survival_cuts(m, cuts)
        task = compiled.with_cuts(m, cut_rows)
        state, bound, took_s = _solved(m, task, replace(limits, time_s=limits.time_s - spent), relaxed)
        if state != "found":
            return "infeasible" if state == "infeasible" else "out of time", cuts
        spent += took_s
        x: Floats = np.round(m.x.value)
        fresh, left = _losses(problem, x, m.hosts, strains)
        if not fresh:
            cost = float(compiled.cost.value)
            within = task.status == cp.OPTIMAL or bound >= (1.0 - limits.gap) * cost
            solution = Solution(
                problem.arrays.placement(x), "optimal" if within else "incumbent", cost, bound if np.isfinite(bound) else None,
                spent, number, tuple(names[cut.lost] for cut in cuts), left, _binding([*compiled.rows, *cut_rows]),
            )  # fmt: skip
            return solution, cuts
        cuts += fresh
    return "out of time", cuts


def _solved(m: Model, task: cp.Problem, limits: Limits, relaxed: Relaxed | None) -> tuple[State, float, float]:
    """Solve one program, a large one in two steps: first where the relaxation has anything, then everywhere, from there on.

    Returns:
        How it ended, a bound of the cost, and the solver's time [s].
    """
    enough = relaxed.enough(limits.gap) if relaxed is not None else -math.inf
    bound, spent = relaxed.bound if relaxed is not None else -math.inf, 0.0
    if relaxed is not None:
        m.open.value = relaxed.support.astype(float)
        state = _run(task, NARROW_SHARE * limits.time_s, limits.gap / 2.0, enough)
        spent = float(task.solver_stats.solve_time)
        m.open.value = m.hosts.astype(float)
        if state == "found" and float(task.value) <= enough:
            return state, bound, spent
    state = _run(task, max(0.0, limits.time_s - spent), limits.gap, enough)
    spent += float(task.solver_stats.solve_time)
    return state, max(bound, float(task.solver_stats.extra_stats.mip_dual_bound)), spent


def _losses(problem: Problem, x: Floats, hosts: Bools, strains: Mapping[str, Strain]) -> tuple[list[Cut], dict[str, float]]:
    """Cuts for the losses that leave less than is asked, and what every loss leaves."""
    cuts, left = [], {}
    for n, node in enumerate(problem.nodes):
        share = left[node.name] = flows.carried(problem, x, n).share
        strain = strains.get(node.name, Strain(problem.parameters.gamma))
        asked = strain.on(problem)
        if node.name in strains:
            share = flows.carried(asked, x, n, most=strain.load).share
        if share < strain.load - SHORTFALL:
            dual = flows.carried(asked, x, n, hosts, most=strain.load)
            cuts.append(Cut(n, strain, dual.share, dual.prices, x))
    return cuts, left


def _run(task: cp.Problem, time_s: float, gap: float, enough: float = -math.inf) -> State:
    """Solve a task, from its last answer where there is one that still holds; what costs no more than `enough` is taken."""
    options = {
        "output_flag": False, "threads": 1, "random_seed": 0,
        "time_limit": time_s, "mip_rel_gap": gap, "objective_target": enough,
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            # At the time limit; the status says so too.
            warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
            task.solve(solver=cp.HIGHS, **options)
    except cp.SolverError as error:
        raise SolverFailed(f"the solver failed: {error}") from None
    if task.status in (cp.INFEASIBLE, "infeasible_or_unbounded"):
        return "infeasible"
    if task.status not in (cp.OPTIMAL, cp.USER_LIMIT):
        raise SolverFailed(f"the solver ended with {task.status!r}")
    feasible = 2
    return "found" if task.solver_stats.extra_stats.primal_solution_status == feasible else "nothing"


def relax(problem: Problem, limits: Limits) -> tuple[Relaxation, ...]:
    """The smallest relaxation that makes the problem feasible: least sum of broken rules, each in its own units.

    Capacity counts in nodes' worth of it, survival and traffic in shares, diversity, sparsity and replicas in pieces.
    """
    m = Model(problem, problem.arrays.allowed)
    m.set(problem, None)
    pairs = interchangeable(problem, m.hosts, m.current.value, {})
    fixed = [*conservation(m), *support(m), *service(m), *moves(m), *order(m, pairs)]
    rows = [row for rule in RULES for row in rule(m)]
    cuts: list[Cut] = []
    for _ in range(limits.rounds):
        all_rows = [*rows, *survival_cuts(m, cuts)]
        slack = [cp.Variable(len(row.subjects), nonneg=True) for row in all_rows]
        soft = [rule for row, s in zip(all_rows, slack, strict=True) for rule in _softened(m, row, s)]
        total = sum(cp.sum(s) for s in slack)
        task = cp.Problem(cp.Minimize(total + 1e-4 * objective(m) / _typical(m)), [*fixed, *soft])
        if _run(task, limits.time_s, 1e-6) != "found":
            return ()
        given = [
            Relaxation(row.rule, subject, float(amount * unit), row.unit)
            for row, s in zip(all_rows, slack, strict=True)
            for subject, amount, unit in zip(row.subjects, s.value, np.broadcast_to(row.scale, s.shape), strict=True)
            if amount * unit > 1e-5
        ]
        fresh = _losses(problem, np.round(m.x.value), m.hosts, {})[0]
        excused = {cut.lost for cut, s in zip(cuts, slack[len(rows) :], strict=True) if s.value[0] > SHORTFALL}
        if all(cut.lost in excused for cut in fresh):
            return tuple(given)
        cuts += [cut for cut in fresh if cut.lost not in excused]
    return ()


def _softened(m: Model, row: Row, slack: cp.Variable) -> list[cp.Constraint]:
    """A rule that may be broken by some slack. More capacity is real: light services may use it too."""
    given = cp.multiply(row.scale, slack)
    if row.rule == "capacity":
        return [row.excess <= 0, m.extra[:, RESOURCES.index(row.unit)] == given]
    return [row.excess <= given]


def _typical(m: Model) -> float:
    """Cost of everything once, to make the true objective a small number beside the relaxations."""
    return float(m.problem.parameters.cpu_price * (m.problem.arrays.needs[:, 0] * m.most.value).sum()) + 1.0


def told(relaxations: Sequence[Relaxation]) -> str:
    """The relaxation in one sentence."""
    if not relaxations:
        return "no placement keeps every rule, and no relaxation was found in time; try fewer replicas or a longer time limit"
    rules = ", ".join(dict.fromkeys(r.rule for r in relaxations))
    listed = "; ".join(f"{r.rule} ({r.subject}) by {r.amount:.3g} {r.unit}" for r in relaxations)
    return f"no placement keeps every rule; what is in the way: {rules}. The smallest relaxation: {listed}"


def at_the_limit(problem: Problem, found: Solution | None, spent_s: float, current: Placement | None) -> Solution:
    """The cheapest of what the program found in time, the greedy placement and spread, among those that keep every rule.

    Where none does, the cheapest of the heuristics' placements; `carried` says what losses leave of it.

    Raises:
        Infeasible: nothing was found in time, and the heuristics find nothing either.
    """
    choices, refused = [] if found is None else [(True, found)], None
    for name, heuristic in HEURISTICS.items():
        try:
            placement = heuristic(problem, current, None)
        except Infeasible as error:
            refused = error
            continue
        solution = judged(problem, placement, name, current)
        if found is not None:
            solution = replace(solution, bound=found.bound, rounds=found.rounds)
        keeps = flows.keeps(problem, problem.arrays.counts(placement), solution.carried)
        choices.append((keeps, replace(solution, solve_s=spent_s)))
    if not choices:
        raise refused or Infeasible("no placement was found in time; try a longer time limit")
    return min(choices, key=lambda choice: (not choice[0], choice[1].cost))[1]


def judged(problem: Problem, placement: Placement, status: Status, current: Placement | None) -> Solution:
    """A placement that somebody else made, as a solution: its cost, and what losses leave of it."""
    x = problem.arrays.counts(placement)
    return Solution(placement, status, flows.cost_of(problem, x, current), None, 0.0, 0, (), flows.survivors(problem, x), ())


HEURISTICS: Mapping[Status, Callable[[Problem, Placement | None, Mapping[str, Target] | None], Placement]] = {
    "greedy": heuristics.near, "spread": heuristics.spread,
}  # fmt: skip
"""(problem, what runs, replicas wanted) -> placement."""


def _binding(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        excess = np.asarray(row.excess.value, float).ravel()
        for subject, value in zip(row.subjects, excess, strict=True):
            if row.rule not in ("busiest link", "deadline") and value >= -1e-6:
                found[row.rule, subject] = None
    return tuple(found)


# --- which nodes are worth considering ------------------------------------------------------------------------------------


def candidates(problem: Problem) -> Bools:
    """Where replicas are considered: everywhere on small testbeds; on large ones the nodes near to where tasks enter.

    Nodes are taken in order of their distance from the entries, weighted by load, until they have PRUNE_FACTOR times the
    room that is needed of every resource and every service has enough of them. A program that turns out infeasible on the
    candidates is solved again on all nodes.
    """
    a, p = problem.arrays, problem.parameters
    number = len(problem.nodes)
    if number <= PRUNE_ABOVE:
        return a.allowed
    loads = sum((d.rate * a.entry(d) for d in problem.demands), np.zeros(number))
    ranked = np.lexsort((np.arange(number), -a.capacity[:, 0], a.latency @ loads))
    wanted = PRUNE_FACTOR * (a.needs * np.maximum(a.need, p.kappa)[:, None]).sum(axis=0) + np.array(problem.reserve)
    chosen = np.zeros(number, bool)
    for n in ranked:
        enough = (a.capacity[chosen].sum(axis=0) >= np.minimum(wanted, a.capacity.sum(axis=0))).all()
        if chosen.sum() >= PRUNE_ABOVE and enough:
            break
        chosen[n] = True
    found: Bools = a.allowed & chosen[None, :]
    pinned = found.sum(axis=1) < np.minimum(p.kappa + 1, a.allowed.sum(axis=1))
    found[pinned] = a.allowed[pinned]
    return found


def _support(problem: Problem, linear: Model, current: Placement | None) -> Bools:
    """Where the relaxation has anything, or something runs; for each service on one node more than it needs at least."""
    a, chosen = problem.arrays, linear.x.value > SUPPORT
    if current is not None:
        chosen |= (a.counts(current) > 0) & linear.hosts
    near = a.latency @ sum((d.rate * a.entry(d) for d in problem.demands), np.zeros(len(problem.nodes)))
    for s in range(len(chosen)):
        others = [n for n in np.lexsort((np.arange(len(near)), near)) if linear.hosts[s, n] and not chosen[s, n]]
        chosen[s, others[: max(0, problem.parameters.kappa + 1 - int(chosen[s].sum()))]] = True
    found: Bools = chosen
    return found


def interchangeable(problem: Problem, hosts: Bools, current: Floats, strains: Mapping[str, Strain]) -> list[tuple[int, int]]:
    """Pairs of nodes (each with the next of its kind) that may swap names without anything changing."""
    a = problem.arrays
    asked = np.array([_numbers(strains.get(node)) for node in a.node])
    entries = np.array([a.entry(d) for d in problem.demands]).reshape(-1, len(problem.nodes))
    kinds: list[list[int]] = []
    for n in range(len(problem.nodes)):
        for kind in kinds:
            tables = (a.capacity, hosts.T, current.T, entries.T, asked)
            if _alike(kind[0], n, *tables) and _swap(kind[0], n, a.latency, a.bandwidth):
                kind.append(n)
                break
        else:
            kinds.append([n])
    return [pair for kind in kinds for pair in itertools.pairwise(kind)]


def _numbers(strain: Strain | None) -> tuple[float, float]:
    return (0.0, 0.0) if strain is None else (strain.load, strain.deadline)


def _alike(u: int, v: int, *tables: Floats | Bools) -> bool:
    return all(np.array_equal(table[u], table[v]) for table in tables)


def _swap(u: int, v: int, *matrices: Floats) -> bool:
    swapped = np.arange(len(matrices[0]))
    swapped[[u, v]] = v, u
    return all(np.array_equal(matrix, matrix[np.ix_(swapped, swapped)]) for matrix in matrices)
