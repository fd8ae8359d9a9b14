"""How long the placement program takes to a gap of 1 %: `python -m tests.bench.solve`, 20 core services, 8 pipelines.

Random testbeds of `tests.bench.placement`, of 30 nodes with a limit of 5 s and of 100 nodes with one of 60 s. What decides how
hard one is, is the share of all cores at work: the fuller the near nodes, the less the relaxation says of whole replicas.
"""

from __future__ import annotations

import json
import time
from typing import Any

from orchestrator.placement.program import Limits, Program
from tests.bench.placement import drawn

SIZES = {30: 5.0, 100: 60.0}
"""Nodes, and the limit of the solver's time [s]."""
LOADS = (0.05, 0.1, 0.25)
"""Cores at work on average, as a share of all."""
SEEDS = (0, 1, 2)
SERVICES, PIPELINES = 20, 8


async def measure() -> dict[str, Any]:
    """`placement_solve`: for each size, load and seed {seconds, process_s, gap, status}."""
    rows = [_solved(nodes, load, seed) for nodes in SIZES for load in LOADS for seed in SEEDS]
    return {"placement_solve": rows}


def _solved(nodes: int, load: float, seed: int) -> dict[str, Any]:
    problem = drawn(seed, nodes, SERVICES, PIPELINES, load=load)
    began, spent = time.perf_counter(), time.process_time()
    found = Program(problem, Limits(time_s=SIZES[nodes])).solve()
    return {
        "nodes": nodes, "load": load, "seed": seed, "seconds": time.perf_counter() - began,
        "process_s": time.process_time() - spent, "gap": found.gap, "status": found.status,
    }  # fmt: skip


if __name__ == "__main__":
    import asyncio

    print(json.dumps(asyncio.run(measure()), indent=2))
