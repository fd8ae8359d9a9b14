"""One decision of the online controller, 100 services on 500 nodes: `python -m tests.bench.tick`, processor seconds.

Services are stages of 25 pipelines of four, one in four of them core. What is ordered is ready at once. `steady`: all
rates stay, within chance; `jump`: all of them triple in one slot, so that everything is decided and placed anew.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from orchestrator.core import Node, Observation, PipelineObservation, Placement, Service, ServiceObservation, Signal, Target
from orchestrator.scaling import autoscaler
from orchestrator.scaling.controller import Lyapunov, State
from orchestrator.scaling.site import Law, Promise, Site
from services.dataplane.routes import ReplicaState

SERVICES, NODES, STAGES = 100, 500, 4
RATE = 50.0
"""Of every pipeline [tasks/s]."""
ROUNDS = 10


async def measure() -> dict[str, Any]:
    """`tick_s` {steady, jump}: medians over `ROUNDS` decisions, each from a state that has settled [s]."""
    begin = settled(site(1))
    return {"tick_s": {"steady": _median(lambda i: begin.tick(1.0, i)), "jump": _median(lambda i: begin.tick(3.0, i))}}


def site(seed: int) -> Site:
    """A site of that seed, where three times the load still fits."""
    rng = np.random.default_rng(seed)
    names = [f"service-{i}" for i in range(SERVICES)]
    services = tuple(
        Service(
            name, "core" if i % STAGES == 1 else "light", round(float(rng.uniform(0.5, 2.0)), 2), int(rng.uniform(1e8, 5e8))
        )
        for i, name in enumerate(names)
    )
    nodes = tuple(Node(f"node-{i}", round(float(rng.uniform(8, 64)), 1), int(rng.uniform(16e9, 64e9))) for i in range(NODES))
    laws = {name: Law(float(rng.uniform(0.01, 0.04)), 0.5) for name in names}
    paths = [tuple(names[i : i + STAGES]) for i in range(0, SERVICES, STAGES)]
    return Site(
        services=services,
        nodes=nodes,
        targets={service.name: Target(4 if service.tier == "light" else 12) for service in services},
        flows=frozenset(pair for path in paths for pair in pairwise(path)),
        latencies_s=_latencies(rng, nodes),
        laws=laws,
        promises={f"pipeline-{i}": Promise(0.4, 0.05, (path,), (0.01,)) for i, path in enumerate(paths)},
    )


def _latencies(rng: np.random.Generator, nodes: tuple[Node, ...]) -> dict[tuple[str, str], float]:
    """By distance, of nodes at random in the unit square [s]."""
    places = rng.random((len(nodes), 2))
    apart = 0.005 * np.linalg.norm(places[:, None] - places[None], axis=2)
    return {(a.name, b.name): float(apart[i, j]) for i, a in enumerate(nodes) for j, b in enumerate(nodes) if i != j}


class Loop:
    """A policy and the state that it is in."""

    def __init__(self, policy: Lyapunov, state: State, placement: Placement, t: float) -> None:
        self.policy, self.state, self.placement, self.t = policy, state, placement, t

    def observation(self, times: float, seed: int) -> Observation:
        """The next slot's, with so many times the usual load."""
        rng = np.random.default_rng(seed)
        ready, standby = self.placement.ready, self.placement.standby
        services = {}
        for service in self.policy.site.services:
            name, law = service.name, self.policy.site.laws[service.name]
            on: dict[str, dict[ReplicaState, int]] = {node: {"ready": n} for node, n in ready.get(name, {}).items()}
            for node, n in standby.get(name, {}).items():
                on.setdefault(node, {})["standby"] = n
            rate = float(rng.poisson(times * RATE))
            services[name] = ServiceObservation(on, Signal(0.1, rate, 0.0, rate * law.mean_s, 0.0, law.mean_s, law.cv2, 1.0))
        pipelines = {name: PipelineObservation(0.1, 1.0, {"on_time": times * RATE}) for name in self.policy.site.promises}
        return Observation(self.t, services, pipelines)

    def tick(self, times: float, seed: int) -> tuple[float, State]:
        """Processor time of one decision [s], and the state after it."""
        seen = self.observation(times, seed)
        begin = time.process_time()
        state, decision = self.policy.step(self.state, seen)
        took_s = time.process_time() - begin
        assert decision.desired is not None, decision.reason
        return took_s, state


def settled(where: Site, slots: int = 60) -> Loop:
    """A loop after so many slots of the usual load."""
    policy = Lyapunov(where)
    loop = Loop(policy, policy.initial(), autoscaler.place(where, where.targets, Placement()), 0.0)
    for i in range(slots):
        _, state = loop.tick(1.0, 1000 + i)
        loop = Loop(policy, state, state.placement or loop.placement, loop.t + where.slot_s)
    return loop


def _median(tick: Callable[[int], tuple[float, State]]) -> float:
    return statistics.median(tick(i)[0] for i in range(ROUNDS))


if __name__ == "__main__":
    import asyncio

    print(json.dumps(asyncio.run(measure()), indent=2))
