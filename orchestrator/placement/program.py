"""The integer program of the core tier (`formulation`) solved: replicas x[s, n] at the least cost, so that any node may go.

Survival is exact and lazy: the program starts with a capacity row per service and lost node, then `flows.carried` routes what
is left after each loss; every loss that carries less than gamma adds a cut, and the program is solved again until all hold.

Elastic form: every rule may be broken at a price per unit, which gives the smallest relaxation where nothing is feasible.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cvxpy as cp
import numpy as np

from orchestrator.core import Placement, Target
from orchestrator.errors import EspalierError, Infeasible
from orchestrator.placement import flows, heuristics
from orchestrator.placement.flows import SHORTFALL
from orchestrator.placement.formulation import RULES, TIE, Compiled, Cut, Model, Row, objective, survival_cuts, unbroken
from orchestrator.placement.problem import EPSILON, RESOURCES, Bools, Floats, Problem, Strain

Status = Literal["optimal", "incumbent", "greedy", "spread"]
"""Within the gap asked for; at the time limit the best that was found, or a heuristic's, whichever is cheapest."""
State = Literal["found", "infeasible", "nothing"]
"""Of one run of the solver: a placement, the proof that there is none, or neither within the time."""
PRUNE_ABOVE, PRUNE_FACTOR = 12, 3.0
"""With more nodes than that only candidates are considered: at least so many, with so many times the room that is needed."""
SUPPORT = 1e-4
"""What of a replica counts where the relaxation has any."""
PART, PARTS = 6, 16
"""Services that may move in one step of `_improved`, at least; and steps in vain that end it."""


class SolverFailed(EspalierError):
    """The solver gave up for a reason of its own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the program may take, and how good it must be."""

    time_s: float = 60.0
    """Of the integer programs in all; what reads them and looks at losses comes on top."""
    gap: float = 0.01
    """Largest (cost - bound) / cost at which it stops."""
    rounds: int = 50
    """Most times that it is solved with more cuts."""


@dataclass(slots=True)
class Clock:
    """The solver's own time, so that how long a placement may take does not hang on what else runs in the process."""

    limit_s: float
    spent_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Until the limit."""
        return max(0.0, self.limit_s - self.spent_s)


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
        clock = Clock(limits.time_s)
        relaxed = self._relaxed(problem, current, clock, known) if self.model.hosts.shape[1] > PRUNE_ABOVE else None
        found, cuts = _search(problem, self.model, self._compiled[pairs], limits, clock, strains, known, relaxed)
        self._cuts = self._cuts if rates is not None else list(dict.fromkeys([*self._cuts, *cuts]))
        if isinstance(found, Solution):
            beaten = found.status == "incumbent" and not alone
            return at_the_limit(problem, found, clock.spent_s, current) if beaten else found
        if alone:
            raise Infeasible(f"no placement was found that carries what is asked of losses: {', '.join(strains) or 'any'}")
        if found == "infeasible" and (self.model.hosts != problem.arrays.allowed).any():
            return Program(problem, self.limits, prune=False).solve(current)
        if found == "infeasible":
            raise Infeasible(told(relax(problem, self.limits)))
        return at_the_limit(problem, None, clock.spent_s, current)

    def _relaxed(self, problem: Problem, current: Placement | None, clock: Clock, known: Sequence[Cut]) -> Relaxed | None:
        """The linear relaxation; None where it was not solved in time."""
        linear = Model(self.problem, self.model.hosts, relaxed=True)
        linear.set(problem, current)
        task = Compiled.of(linear, ()).with_cuts(linear, survival_cuts(linear, known))
        if _run(task, clock, 0.0) != "found":
            return None
        return Relaxed(float(task.value), _support(self.problem, linear, current))

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

    def enough(self, gap: float) -> float:
        """What costs no more than this is within the gap of every placement."""
        return self.bound / (1.0 - gap) if self.bound > 0.0 and gap < 1.0 else -math.inf


def _search(
    problem: Problem,
    m: Model,
    compiled: Compiled,
    limits: Limits,
    clock: Clock,
    strains: Mapping[str, Strain],
    known: Sequence[Cut],
    relaxed: Relaxed | None,
) -> tuple[Solution | Literal["infeasible", "out of time"], list[Cut]]:
    """Solve, look at every loss, cut, and solve again; also returns the cuts, the known ones among them."""
    names, cuts = [node.name for node in problem.nodes], list(known)
    for number in range(1, limits.rounds + 1):
        if not clock.left_s:
            break
        cut_rows = survival_cuts(m, cuts)
        task = compiled.with_cuts(m, cut_rows)
        state, bound = _solved(m, task, limits.gap, clock, relaxed)
        if state != "found":
            return "infeasible" if state == "infeasible" else "out of time", cuts
        x: Floats = np.round(m.x.value)
        fresh, left = _losses(problem, x, m.hosts, strains)
        if not fresh:
            cost = float(compiled.cost.value)
            within = task.status == cp.OPTIMAL or bound >= (1.0 - limits.gap) * cost
            status: Status = "optimal" if within else "incumbent"
            solution = Solution(
                problem.arrays.placement(x), status, cost, bound if np.isfinite(bound) else None,
                clock.spent_s, number, tuple(names[cut.lost] for cut in cuts), left,
                _binding([*compiled.rows, *cut_rows]),
            )  # fmt: skip
            return solution, cuts
        cuts += fresh
    return "out of time", cuts


def _solved(m: Model, task: cp.Problem, gap: float, clock: Clock, relaxed: Relaxed | None) -> tuple[State, float]:
    """Solve one program. A large one in three steps: where the relaxation has anything, then part by part, then everywhere.

    Returns:
        How it ended, and a bound of the cost.
    """
    if relaxed is None:
        state = _run(task, clock, gap)
        return state, float(task.solver_stats.extra_stats.mip_dual_bound)
    enough = relaxed.enough(gap)
    m.within(relaxed.support)
    state = _run(task, clock, gap / 2.0, enough, nodes=1)
    if state == "found" and _improved(m, task, gap, clock, enough, relaxed.support) <= enough:
        return state, relaxed.bound
    m.within(m.hosts)
    state = _run(task, clock, gap, enough)
    return state, max(relaxed.bound, float(task.solver_stats.extra_stats.mip_dual_bound))


def _improved(m: Model, task: cp.Problem, gap: float, clock: Clock, enough: float, places: Bools) -> float:
    """Make the answer better part by part (large neighbourhood search, Shaw 1998), until it is good enough or no part helps.

    A part are the services of a few pipelines, which may go to any of the places; all others stay. A step ends at the root
    of its search tree. Leaves the best in the variables.

    Returns:
        Its cost.
    """
    best, x, rng, vain = float(task.value), np.round(m.x.value), np.random.default_rng(0), 0
    while best > enough and vain < PARTS and clock.left_s:
        fixed = x.copy()
        for k in rng.permutation(len(m.commodities)):
            if np.isnan(fixed).any(axis=1).sum() < PART:
                fixed[[m.problem.arrays.service[v.service] for v in m.commodities[k].visits]] = math.nan
        m.within(places, fixed)
        state = _run(task, clock, gap / 10.0, enough, nodes=1)
        better = state == "found" and float(task.value) < best * (1.0 - TIE)
        vain = 0 if better else vain + 1
        if better:
            best, x = float(task.value), np.round(m.x.value)
    m.within(m.hosts, x)
    _run(task, Clock(math.inf), gap)  # nothing to choose, so it takes next to no time
    return best


def _losses(problem: Problem, x: Floats, hosts: Bools, strains: Mapping[str, Strain]) -> tuple[list[Cut], dict[str, float]]:
    """Cuts for the losses that leave less than is asked, and what every loss leaves."""
    cuts, left = [], flows.survivors(problem, x)
    for n, node in enumerate(problem.nodes):
        share = left[node.name]
        strain = strains.get(node.name, Strain(problem.parameters.gamma))
        asked = strain.on(problem)
        if node.name in strains:
            share = flows.carried(asked, x, n, most=strain.load).share
        if share < strain.load - SHORTFALL:
            dual = flows.carried(asked, x, n, hosts, most=strain.load)
            cuts.append(Cut(n, strain, dual.share, dual.prices, x))
    return cuts, left


def _run(task: cp.Problem, clock: Clock, gap: float, enough: float = -math.inf, nodes: int | None = None) -> State:
    """Solve a task, from its last answer where there is one that still holds; what costs no more than `enough` is taken."""
    options = {
        "output_flag": False, "threads": 1, "random_seed": 0, "time_limit": clock.left_s, "mip_rel_gap": gap,
        "objective_target": enough, **({"mip_max_nodes": nodes} if nodes is not None else {}),
    }  # fmt: skip
    try:
        with warnings.catch_warnings():
            # At the time limit; the status says so too.
            warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
            task.solve(solver=cp.HIGHS, **options)
    except cp.SolverError as error:
        raise SolverFailed(f"the solver failed: {error}") from None
    clock.spent_s += float(task.solver_stats.solve_time)
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
    fixed = unbroken(m, pairs)
    rows = [row for rule in RULES for row in rule(m)]
    cuts: list[Cut] = []
    for _ in range(limits.rounds):
        all_rows = [*rows, *survival_cuts(m, cuts)]
        slack = [cp.Variable(len(row.subjects), nonneg=True) for row in all_rows]
        soft = [rule for row, s in zip(all_rows, slack, strict=True) for rule in _softened(m, row, s)]
        total = sum(cp.sum(s) for s in slack)
        task = cp.Problem(cp.Minimize(total + 1e-4 * objective(m) / _typical(m)), [*fixed, *soft])
        if _run(task, Clock(limits.time_s), 1e-6) != "found":
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
        if found is not None and flows.cost_of(problem, problem.arrays.counts(placement), current) >= found.cost:
            continue  # losses are not looked at in vain: they take longest
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
