"""How fast the simulator is on one core, over whole runs: `python -m tests.bench.simulator`.

A task-stage event is something that happens to a task, whoever runs it and however many events of the kernel that takes: it
arrives, it ends, and at each stage it is queued, begun and computed. So a task that is computed at s stages is 2 + 3 s events.
"""

from __future__ import annotations

import json
import time
from typing import Any

from loadgen import arrivals
from orchestrator.core import Placement, Target
from orchestrator.simulator.run import Run, run
from orchestrator.simulator.world import World
from tests.orchestrator.simulator.worlds import chain, fork, meshed, stage, static, world

ROUNDS = 5
DURATION_S = 20.0


async def measure() -> dict[str, Any]:
    """`simulator`: for each world `events_per_s` (task-stage events), `visits_per_s` and `kernel_events_per_s`."""
    return {"simulator": {name: _rate(*made) for name, made in _worlds().items()}}


def _worlds() -> dict[str, tuple[World, dict[str, str], Placement]]:
    times = {"a": (0.01, 0.25), "b": (0.02, 0.25), "c": (0.008, 0.5)}
    stages = [stage(name, *law, inputs={"x": 2e4}, outputs={"x": 2e4}) for name, law in times.items()]
    pairs = [f"n{i}" for i in range(4)]
    linked = world(stages, [chain("p", "a", "b", "c", deadline_s=0.4)], nodes=4, links=meshed(4, 0.0005, 1e8))
    alone = world([stage(name, 0.001, 0.25) for name in "abc"], [chain("p", "a", "b", "c", deadline_s=0.4)])
    many = [stage(name, 0.01, 0.25, max_batch=8, inputs={"x": 2e3}, outputs={"x": 2e3}) for name in "abcde"]
    pipelines = [
        fork("f", "a", "b", "c", deadline_s=0.4),
        chain("p", "a", "b", "c", "d", deadline_s=0.4),
        chain("q", "e", "d", deadline_s=0.2),
    ]
    joined = world(many, pipelines, nodes=6, links=meshed(6, 0.0005, 1e8))
    return {
        "three stages of eight replicas, four nodes": (
            linked, {"p": "poisson:300"}, Placement({name: dict.fromkeys(pairs, 2) for name in "abc"}),
        ),
        "three stages of one replica, one node": (
            alone, {"p": "poisson:600"}, Placement({name: {"n0": 1} for name in "abc"}),
        ),
        "three pipelines over five stages, six nodes": (
            joined, {"f": "poisson:150", "p": "mmpp:100@8s,300@2s", "q": "poisson:200"},
            Placement({name: {f"n{i}": 1 for i in range(6)} for name in "abcde"}),
        ),
    }  # fmt: skip


def _rate(where: World, load: dict[str, str], initial: Placement) -> dict[str, float]:
    """The best of some rounds, since whatever else the machine does only slows it down. In processor seconds."""
    policy = static(where, {name: Target(sum(on.values())) for name, on in initial.ready.items()})
    workload = {name: arrivals.parse(spec) for name, spec in load.items()}
    best_s, done = float("inf"), None
    for _ in range(ROUNDS):
        begin = time.process_time()
        done = run(where, "static", policy, workload, initial=initial, duration_s=DURATION_S, slot_s=1.0, seed=1)
        best_s = min(best_s, time.process_time() - begin)
    assert done is not None
    return {
        "events_per_s": events(done) / best_s,
        "visits_per_s": done.visits / best_s,
        "kernel_events_per_s": done.events / best_s,
    }


def events(done: Run) -> int:
    """Task-stage events of a run."""
    return 2 * sum(done.row.outcomes.values()) + 3 * done.visits


if __name__ == "__main__":
    import asyncio

    print(json.dumps(asyncio.run(measure()), indent=2))
