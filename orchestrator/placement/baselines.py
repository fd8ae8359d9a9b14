"""Other ways of placing the core tier, behind one signature, for comparison with the program.

All place the same replicas (`staffing.targets`). Only `greedy_latency` looks at nearness, and `genetic` at the program's
objective; the heuristics themselves are those that the program falls back to (`heuristics`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import numpy as np

from orchestrator.core import Placement
from orchestrator.errors import Infeasible
from orchestrator.placement import heuristics
from orchestrator.placement.flows import cost_of
from orchestrator.placement.problem import EPSILON, Floats, Problem
from orchestrator.placement.staffing import targets

Baseline = Callable[[Problem, int], Placement]
"""(problem, seed) -> placement. Raises Infeasible where it finds none. The seed matters only to `random` and `genetic`."""

POPULATION, GENERATIONS, ELITE = 10, 30, 2
"""Of the genetic search; the sizes that the paper's authors use."""
MUTATION = 0.1
"""Chance of each replica to move, per child."""
MISFIT = 1e6
"""Cost of a placement that does not fit; more than any that does."""


def random(problem: Problem, seed: int) -> Placement:
    """Every replica on any node with room, all alike."""
    rng = np.random.default_rng(seed)
    return heuristics.pack(problem, lambda s, n, x: float(rng.random()))


def spread(problem: Problem, seed: int) -> Placement:
    """See `heuristics.spread`."""
    return heuristics.spread(problem)


def bin_pack(problem: Problem, seed: int) -> Placement:
    """Every replica on the node with the least cores left that still has room (best fit)."""
    arrays = problem.arrays
    return heuristics.pack(problem, lambda s, n, x: float(arrays.capacity[n, 0] - arrays.needs[:, 0] @ x[:, n]))


def greedy_latency(problem: Problem, seed: int) -> Placement:
    """See `heuristics.near`."""
    return heuristics.near(problem)


def genetic(problem: Problem, seed: int) -> Placement:
    """A small genetic search over the nodes of all replicas, with the program's objective as fitness.

    Uniform crossover of two parents drawn from the better half, mutation per replica, the best two kept; starts from random
    placements and from `spread` where that finds one.
    """
    rng = np.random.default_rng(seed)
    owners = [s for name, target in targets(problem).items() for s in [problem.arrays.service[name]] * target.replicas]
    allowed = [np.flatnonzero(problem.arrays.allowed[s]) for s in owners]

    def born() -> list[int]:
        return [int(rng.choice(nodes)) for nodes in allowed]

    pool = [born() for _ in range(POPULATION)]
    with contextlib.suppress(Infeasible):
        pool[0] = _genes(problem.arrays.counts(spread(problem, seed)))
    for _ in range(GENERATIONS):
        pool.sort(key=lambda genes: _fitness(problem, owners, genes))
        children: list[list[int]] = []
        while len(children) < POPULATION - ELITE:
            a, b = (pool[int(i)] for i in rng.integers(0, POPULATION // 2, 2))
            child = [x if rng.random() < 0.5 else y for x, y in zip(a, b, strict=True)]
            moved = [int(rng.choice(nodes)) if rng.random() < MUTATION else x for x, nodes in zip(child, allowed, strict=True)]
            children.append(moved)
        pool = [*pool[:ELITE], *children]
    best = min(pool, key=lambda genes: _fitness(problem, owners, genes))
    if _fitness(problem, owners, best) >= MISFIT:
        raise Infeasible(
            "the genetic search found no placement that fits and carries the load; try another seed, or the program"
        )
    return problem.arrays.placement(_table(problem, owners, best))


BASELINES: Mapping[str, Baseline] = {
    "random": random, "spread": spread, "bin-pack": bin_pack, "greedy-latency": greedy_latency, "genetic": genetic,
}  # fmt: skip


def _genes(x: Floats) -> list[int]:
    return [n for row in x for n, count in enumerate(row) for _ in range(round(count))]


def _table(problem: Problem, owners: list[int], genes: list[int]) -> Floats:
    x = np.zeros((len(problem.services), len(problem.nodes)))
    np.add.at(x, (owners, genes), 1)
    return x


def _fitness(problem: Problem, owners: list[int], genes: list[int]) -> float:
    x, arrays = _table(problem, owners, genes), problem.arrays
    over = float(np.maximum((x.T @ arrays.needs - arrays.capacity) / np.maximum(arrays.capacity, 1.0), 0).sum())
    return MISFIT * (1 + over) if over > EPSILON else min(cost_of(problem, x), MISFIT)
