"""Placements without a solver, replica by replica: what the program is held against, and falls back to at its time limit.

All place the same replicas, `staffing.targets` unless others are asked for, within the nodes' capacities and where each service
may run. None looks at links, deadlines or losses, but for `near`, which looks at nearness. O(replicas * services * nodes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from orchestrator.core import Placement, Target
from orchestrator.errors import Infeasible
from orchestrator.placement import greedy
from orchestrator.placement.problem import EPSILON, Demand, Floats, Problem
from orchestrator.placement.staffing import targets

Badness = Callable[[int, int, Floats], float]
"""(service, node, replicas so far) -> the less, the better."""


def near(problem: Problem, current: Placement | None = None, wanted: Mapping[str, Target] | None = None) -> Placement:
    """The live system's heuristic: spread, and among equals near to the services it talks to (`greedy.place`).

    Raises:
        Infeasible: they do not fit.
    """
    placed = greedy.place(
        [hosted.service for hosted in problem.services],
        problem.nodes,
        targets(problem) if wanted is None else wanted,
        latencies_s=problem.latencies_s,
        keep=current,
        flows=sorted({pair for demand in problem.demands for pair in _passes(demand)}),
    )
    return problem.arrays.placement(problem.arrays.counts(placed))


def spread(problem: Problem, current: Placement | None = None, wanted: Mapping[str, Target] | None = None) -> Placement:
    """Every replica on the node with the fewest of its service, then with the smallest share of its cores reserved.

    What runs does not matter to it.

    Raises:
        Infeasible: they do not fit.
    """
    arrays = problem.arrays
    return pack(
        problem,
        lambda s, n, x: float(x[s, n]) * 1e6 + float(arrays.needs[:, 0] @ x[:, n] / arrays.capacity[n, 0]),
        wanted,
    )


def pack(problem: Problem, badness: Badness, wanted: Mapping[str, Target] | None = None) -> Placement:
    """Replicas one by one, services that need most first, each on the node with room and the least badness.

    Raises:
        Infeasible: one has no room anywhere.
    """
    arrays = problem.arrays
    wanted = targets(problem) if wanted is None else wanted
    names = list(arrays.service)
    x = np.zeros((len(names), len(problem.nodes)))
    for s in sorted(range(len(names)), key=lambda s: (*-arrays.needs[s, ::-1], s)):
        for number in range(wanted[names[s]].replicas):
            room = arrays.capacity - x.T @ arrays.needs + EPSILON * 1e3
            fitting = [n for n in range(len(problem.nodes)) if arrays.allowed[s, n] and (arrays.needs[s] <= room[n]).all()]
            if not fitting:
                raise Infeasible(f"no node has room for replica {number + 1} of {wanted[names[s]].replicas} of {names[s]}")
            scores = [(badness(s, n, x), n) for n in fitting]
            x[s, min(scores)[1]] += 1
    return arrays.placement(x)


def _passes(demand: Demand) -> list[tuple[str, str]]:
    service_of = {visit.id: visit.service for visit in demand.visits}
    return [(service_of[e.source], service_of[e.target]) for e in demand.edges if e.source and e.target]
