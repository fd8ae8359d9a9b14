"""How many replicas the heuristics start from: enough for the load, also when the node with most of them is lost."""

from __future__ import annotations

import math

from orchestrator.core import Target
from orchestrator.placement.problem import Problem


def targets(problem: Problem) -> dict[str, Target]:
    """Least replicas of each service that cover its load, its kappa and, spread evenly, the loss of any one node."""
    arrays, kappa = problem.arrays, problem.parameters.kappa
    found = {}
    for name, s in arrays.service.items():
        nodes = int(arrays.allowed[s].sum())
        if problem.parameters.most_nodes is not None:
            nodes = min(nodes, problem.parameters.most_nodes)
        count, left = max(int(arrays.need[s]), kappa), int(arrays.need_after_loss[s])
        while nodes > 1 and count - math.ceil(count / min(nodes, count)) < left:
            count += 1
        found[name] = Target(count)
    return found
