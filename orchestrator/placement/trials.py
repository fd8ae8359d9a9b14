"""Placements tried under the loss of every node, and asked for more where they fail, until one keeps its promise.

The program knows flows, not queues: a loss may leave enough replicas in reach and still make tasks late. So a placement that
the program finds is tried by whoever can (a simulation; nothing here knows it). After each loss that leaves less on time than
was promised, more is asked of that loss: first to carry as much as spread would, then more load than there is, so that replicas
are less than full, and time left for waits (`STEPS`). The program answers with cuts, and the next placement is tried. Where it
has no answer, that loss is asked no more. The heuristics' placements are tried beside the program's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.core import Placement
from orchestrator.errors import Infeasible
from orchestrator.placement import flows
from orchestrator.placement.problem import EPSILON, Problem, Strain
from orchestrator.placement.program import HEURISTICS, Limits, Program, Solution, Status, judged

Trial = Callable[[Placement], Mapping[str, float]]
"""Lost node -> least share of any pipeline's tasks that are on time then; with nothing lost under `NOTHING_LOST`."""
NOTHING_LOST = ""
STEPS = ((1.0, 1.0), (1.05, 1.0), (1.1, 1.0), (1.1, 0.9), (1.2, 0.8), (1.4, 0.7))
"""What a loss is asked for, step by step: (load, as a share of what spread carries then; share of the deadline)."""
GAP = 0.03
"""At which the program stops when it is asked for more; what it then finds is tried, not trusted."""
MARGIN = 3.0
"""How many times the load is looked for at most, in what spread carries."""
ROUNDS = 12
"""Most placements of the program that are tried."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A placement and what came of it."""

    name: str
    """"program", with the number of the round after it from the second on, or the heuristic's."""
    solution: Solution
    on_time: Mapping[str, float]
    strains: Mapping[str, Strain]
    """What was asked of the program, by lost node."""

    @property
    def worst(self) -> float:
        """The least share on time, whatever is lost."""
        return min(self.on_time.values())


@dataclass(frozen=True, slots=True)
class Withstood:
    """The placement chosen, and everything that was tried."""

    best: Tried
    tried: tuple[Tried, ...]
    level: float
    """What was asked for: gamma, or what spread keeps at the same cost where that is more."""


def withstand(problem: Problem, limits: Limits, trial: Trial, current: Placement | None = None) -> Withstood:
    """The cheapest placement found that leaves gamma of every pipeline's tasks on time after any loss, and no less than spread.

    Where none does, the one that leaves most after its worst loss; so also where the promise does not fit into the budget.

    Args:
        problem: with the promise, `parameters.gamma`.
        limits: of the first solve; those after it may take a quarter of the time each.
        trial: tries a placement.
        current: what runs.

    Raises:
        Infeasible: the program finds no placement at all.
    """
    program = Program(problem, limits)
    try:
        first = program.solve(current, strains={})
    except Infeasible:
        if problem.parameters.budget is not None:
            # It is too small for what is promised; what comes nearest to the promise is still worth finding.
            program = Program(replace(problem, parameters=replace(problem.parameters, gamma=0.0)), limits)
        first = program.solve(current)
    tried = [
        Tried(name, judged(problem, placement, status, current), trial(placement), {})
        for name, status, placement in _rivals(problem, first.placement, current)
    ]
    level = max([problem.parameters.gamma, *(rival.worst for rival in tried if rival.solution.status == "spread")])
    shorter = replace(limits, time_s=limits.time_s / 4, gap=max(limits.gap, GAP))
    asking = _Asking(program, shorter, current, _ladders(program.problem, tried), {}, {NOTHING_LOST})
    found: Solution | None = first
    for number in range(1, ROUNDS + 1):
        if found is None:
            break
        known = next((t.on_time for t in tried if t.solution.placement.ready == found.placement.ready), None)
        on_time = trial(found.placement) if known is None else known
        tried.append(Tried("program" if number == 1 else f"program {number}", found, on_time, asking.strains(asking.steps)))
        found = asking.more({node: share for node, share in on_time.items() if share < level}, found)
    return Withstood(min(tried, key=lambda t: (-min(t.worst, level), t.solution.cost)), tuple(tried), level)


@dataclass(slots=True)
class _Asking:
    """How far every loss has been asked for more."""

    program: Program
    limits: Limits
    current: Placement | None
    ladders: Mapping[str, tuple[Strain, ...]]
    steps: dict[str, int]
    """Lost node -> steps taken."""
    closed: set[str]
    """Losses that are asked no more."""

    def strains(self, steps: Mapping[str, int]) -> dict[str, Strain]:
        """What is asked after so many steps."""
        return {node: self.ladders[node][step - 1] for node, step in steps.items()}

    def more(self, weak: Mapping[str, float], found: Solution) -> Solution | None:
        """The program's answer to a step more for all weak losses, else for the weakest alone; None where all are closed."""
        while True:
            following = {node: self._next(node, found) for node in weak if node not in self.closed}
            self.closed |= {node for node, step in following.items() if step is None}
            open_ones = {node: step for node, step in following.items() if step is not None}
            if not open_ones:
                return None
            weakest = min(open_ones, key=lambda node: (weak[node], node))
            for raised in (open_ones, {weakest: open_ones[weakest]}):
                steps = {**self.steps, **raised}
                with contextlib.suppress(Infeasible):
                    answer = self.program.solve(self.current, strains=self.strains(steps), limits=self.limits)
                    self.steps = steps
                    return answer
            self.closed.add(weakest)

    def _next(self, node: str, found: Solution) -> int | None:
        """The next step that asks for more than the placement carries already; None at the end."""
        problem = self.program.problem
        x, lost = problem.arrays.counts(found.placement), problem.arrays.node[node]
        for step in range(self.steps.get(node, 0) + 1, len(STEPS) + 1):
            strain = self.ladders[node][step - 1]
            if flows.carried(strain.on(problem), x, lost, most=strain.load).share < strain.load - flows.SHORTFALL:
                return step
        return None


def _ladders(problem: Problem, tried: Sequence[Tried]) -> dict[str, tuple[Strain, ...]]:
    """Every node's steps, from what the best spread carries without it; where there is none, from the whole load."""
    spreads = [t for t in tried if t.solution.status == "spread"]
    counts = [problem.arrays.counts(max(spreads, key=lambda t: t.worst).solution.placement)] if spreads else []
    base = {
        node: max([problem.parameters.gamma, *(flows.carried(problem, x, n, most=MARGIN).share for x in counts)], default=1.0)
        for node, n in problem.arrays.node.items()
    }
    return {node: tuple(Strain(load * more, share) for more, share in STEPS) for node, load in base.items()}


def _rivals(problem: Problem, found: Placement, current: Placement | None) -> list[tuple[str, Status, Placement]]:
    """The heuristics' placements that cost no more for replicas than is allowed, and keep the rules but for survival."""
    p, arrays = problem.parameters, problem.arrays
    price = p.cpu_price * arrays.needs[:, 0]
    most = float(price @ arrays.counts(found).sum(axis=1)) if p.budget is None else p.budget
    counts = {service: found.target(service) for service in arrays.service}
    allowed: list[tuple[str, Status, Placement]] = []
    for (status, heuristic), (what, wanted) in itertools.product(
        HEURISTICS.items(), (("", None), (" of the program's replicas", counts))
    ):
        try:
            placement = heuristic(problem, current, wanted)
        except Infeasible:
            continue
        x = arrays.counts(placement)
        fresh = all(placement.ready != other.ready for _, _, other in allowed)
        if fresh and float(price @ x.sum(axis=1)) <= most + EPSILON and flows.keeps(problem, x, {}):
            allowed.append((status + what, status, placement))
    return allowed
