"""Placements under the loss of every single node, simulated: the program beside the baselines, at the same replica cost.

    python -m tests.bench.placement [INSTANCES]

Random testbeds of 8 to 12 nodes that are all linked, 4 to 6 core services and 3 or 4 pipelines with deadlines. The budget is
what the baselines' replicas cost. A placement is chosen by trials with one random stream and measured with another. Writes
out/bench/placement.json: per instance and method the least share of any pipeline's tasks on time, with nothing lost and after
the worst loss. A quarter of an hour on one core.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from loadgen.arrivals import ArrivalProcess, Poisson
from models.manifest import ServiceLaw
from orchestrator.core import Node, Placement, Service
from orchestrator.errors import Infeasible
from orchestrator.losses import LossTrial
from orchestrator.placement.baselines import BASELINES
from orchestrator.placement.flows import cost_of
from orchestrator.placement.problem import MIB, Demand, Edge, Floats, Hosted, Parameters, Problem, Visit
from orchestrator.placement.program import Limits
from orchestrator.placement.staffing import targets
from orchestrator.placement.trials import NOTHING_LOST, withstand
from orchestrator.simulator.laws import Gamma
from orchestrator.simulator.world import Stage, World
from services.dataplane.pipeline import REQUEST, Pipeline, Step
from services.dataplane.routes import Link

ANSWER_BYTES, CV2 = 1e3, 0.05
LEVEL, CHOSEN_AT = 0.95, 0.96
"""Share on time to be kept after any loss; what the trials that choose ask for, more by what another stream may say."""
PARAMETERS = Parameters(gamma=CHOSEN_AT, utilisation=0.7, utilisation_after_loss=0.85)
REPORT = Path(__file__).parents[2] / "out" / "bench" / "placement.json"


def main(instances: int) -> int:
    """Place and measure every instance; 0 when the bar was reached on all of them."""
    console, rows = Console(stderr=True), []
    for seed in range(instances):
        rng = np.random.default_rng([seed, 1])
        sizes = (int(rng.integers(8, 13)), int(rng.integers(4, 7)), int(rng.integers(3, 5)))
        rows.append({"seed": seed, **measure(within_budget(drawn(seed, *sizes, parameters=PARAMETERS)))})
        console.print(f"{seed}: {_said(rows[-1])}")
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps({"level": LEVEL, "instances": rows}, indent=2) + "\n")
    console.print(_table(rows))
    return int(not all(kept(row) for row in rows))


def within_budget(problem: Problem) -> Problem:
    """The same where replicas may cost what those of the baselines do."""
    wanted = targets(problem)
    budget = sum(h.service.cpus * wanted[h.service.name].replicas for h in problem.services)
    return replace(problem, parameters=replace(problem.parameters, budget=problem.parameters.cpu_price * budget))


def measure(
    problem: Problem,
    chosen_s: float = 45.0,
    measured_s: float = 60.0,
    limits: Limits | None = None,
    methods: Sequence[str] = tuple(BASELINES),
) -> dict[str, Any]:
    """Every method's shares on time, and how the program's placement was chosen."""
    world, workload = world_of(problem), {d.name: Poisson(rate=d.rate) for d in problem.demands}
    trial = LossTrial(world, workload, measured_s=chosen_s, seed=1)
    began = time.process_time()
    found = withstand(problem, limits or Limits(), trial)
    spent_s = time.process_time() - began
    first = next(tried for tried in found.tried if tried.name == "program")
    placed = {"chosen": found.best.solution.placement, "program": first.solution.placement}
    for name in methods:
        try:
            placed[name] = BASELINES[name](problem, 1)
        except Infeasible:
            continue
    shares = {name: _shares(world, workload, placement, measured_s) for name, placement in placed.items()}
    rounds = sum(tried.name.startswith("program") for tried in found.tried)
    return {
        "nodes": len(problem.nodes), "services": len(problem.services), "budget": problem.parameters.budget,
        "tasks": measured_s * max(demand.rate for demand in problem.demands),
        "chosen": found.best.name, "rounds": rounds, "process_s": spent_s, "shares": shares,
        "cost_per_s": {name: cost_of(problem, problem.arrays.counts(p)) for name, p in placed.items()},
    }  # fmt: skip


def _shares(world: World, workload: Mapping[str, ArrivalProcess], placement: Placement, measured_s: float) -> dict[str, float]:
    on_time = LossTrial(world, workload, measured_s=measured_s, seed=2)(placement)
    return {"normal": on_time[NOTHING_LOST], "worst": min(on_time.values())}


def kept(row: Mapping[str, Any]) -> bool:
    """Whether the chosen placement keeps the level wherever any does, and no less than spread.

    Less than spread is less by two standard errors of the difference, for the tasks of the pipeline that has most.
    """
    worst = {name: shares["worst"] for name, shares in row["shares"].items()}
    chosen, spread = worst["chosen"], worst.get("spread", 0.0)
    error = 2.0 * math.sqrt((chosen * (1.0 - chosen) + spread * (1.0 - spread)) / row["tasks"])
    return bool((chosen >= LEVEL or max(worst.values()) < LEVEL) and chosen >= spread - error)


def _said(row: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{name} {s['normal']:.3f}/{s['worst']:.3f}" for name, s in row["shares"].items())
    return f"{row['chosen']} of {row['rounds']} rounds, {row['process_s']:.0f} s; {shares}"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["shares"]))
    table = Table("instance", "nodes", "chosen", *names, "kept", title="on time: nothing lost / worst loss")
    for row in rows:
        cells = [row["shares"].get(name) for name in names]
        said = ["-" if c is None else f"{c['normal']:.3f} / {c['worst']:.3f}" for c in cells]
        table.add_row(str(row["seed"]), str(row["nodes"]), row["chosen"], *said, "yes" if kept(row) else "no")
    return table


def drawn(
    seed: int, nodes: int, services: int, pipelines: int, *, load: float = 0.45, parameters: Parameters | None = None
) -> Problem:
    """A random testbed: nodes in a square of 10 ms, links of 20 to 100 MB/s, chains and joins of 2 to 4 services.

    Args:
        seed: of everything.
        nodes: how many; a third of them have four times the cores of the others. Tasks enter at the first.
        services: how many core services, 20 to 80 ms each.
        pipelines: how many; together they visit every service.
        load: cores at work on average, as a share of all.
        parameters: of the placement.
    """
    rng = np.random.default_rng(seed)
    names, at = [f"n{i}" for i in range(nodes)], rng.random((nodes, 2))
    cores = [8.0 if i % 3 == 0 else 2.0 for i in range(nodes)]
    pairs = list(itertools.permutations(range(nodes), 2))
    latency = {(names[a], names[b]): 0.0005 + 0.01 * float(np.hypot(*(at[a] - at[b]))) for a, b in pairs}
    width = {(names[a], names[b]): float(rng.uniform(20e6, 100e6)) for a, b in pairs}
    service_s, cpus = rng.uniform(0.02, 0.08, services), rng.choice([0.5, 1.0], services)
    hosted = tuple(
        Hosted(Service(f"s{i}", "core", float(c), 256 * MIB), float(t), 1 / float(t))
        for i, (c, t) in enumerate(zip(cpus, service_s, strict=True))
    )
    shapes, weights = _shapes(rng, services, pipelines), rng.uniform(0.5, 1.5, pipelines)
    work = sum(w * cpus[s] * service_s[s] for w, chosen in zip(weights, shapes, strict=True) for s in chosen)
    sizes, hop_s = rng.uniform(0.02e6, 0.2e6, services), float(np.mean(list(latency.values())))
    demands = tuple(
        _demand(rng, f"p{k}", float(weights[k] * load * sum(cores) / work), chosen, service_s, sizes, hop_s)
        for k, chosen in enumerate(shapes)
    )
    hardware = tuple(Node(name, c, 16 * 1024 * MIB) for name, c in zip(names, cores, strict=True))
    return Problem(hardware, hosted, demands, latency, width, parameters=parameters or Parameters())


def _shapes(rng: np.random.Generator, services: int, pipelines: int) -> list[list[int]]:
    """Services of each pipeline; every service in at least one."""
    lengths = [min(services, int(rng.integers(2, 5))) for _ in range(pipelines)]
    shapes = [[int(s) for s in rng.choice(services, size=length, replace=False)] for length in lengths]
    for s in set(range(services)) - {s for chosen in shapes for s in chosen}:
        min(shapes, key=len).append(s)
    return shapes


def _demand(
    rng: np.random.Generator, name: str, rate: float, chosen: Sequence[int], service_s: Floats, sizes: Floats, hop_s: float
) -> Demand:
    """A chain of the services, or, of three and more in every other case, all but the last at once and the last as a join.

    The deadline is 2.4 to 3.5 times what the longest way takes without waits, over links of middling length.
    """
    taken = {f"v{i}": s for i, s in enumerate(chosen)}
    ids = list(taken)
    joined = len(chosen) >= 3 and bool(rng.integers(2))
    fan = [(None, v) for v in ids[:-1]] + [(v, ids[-1]) for v in ids[:-1]]
    ways = fan if joined else list(itertools.pairwise([None, *ids]))
    edges = [Edge(a, b, float(sizes[taken[b] if a is None else taken[a]])) for a, b in ways if b is not None]
    longest = max(service_s[s] for s in chosen[:-1]) + service_s[chosen[-1]] if joined else sum(service_s[s] for s in chosen)
    nominal_s = float(longest) + (2 * len(chosen) if not joined else 4) * hop_s
    visits = tuple(Visit(i, f"s{s}") for i, s in taken.items())
    return Demand(
        name, rate, float(rng.uniform(2.4, 3.5)) * nominal_s, visits, (*edges, Edge(ids[-1], None, ANSWER_BYTES)), {"n0": 1.0}
    )  # fmt: skip


def world_of(problem: Problem) -> World:
    """The same as a simulated testbed: one slot and no batches, gamma service times, the gateway where tasks enter."""
    outputs: dict[str, dict[str, float]] = {h.service.name: {"answer": ANSWER_BYTES} for h in problem.services}
    inputs: dict[str, dict[str, float]] = {h.service.name: {} for h in problem.services}
    for demand in problem.demands:
        service_of = {v.id: v.service for v in demand.visits}
        for edge in demand.edges:
            if edge.target is not None:
                inputs[service_of[edge.target]][edge.source or REQUEST] = edge.bytes_per_task
            if edge.source is not None and edge.target is not None:
                outputs[service_of[edge.source]]["out"] = edge.bytes_per_task
    return World(
        nodes=problem.nodes,
        stages={
            h.service.name: Stage(
                h.service, ServiceLaw(base_s=h.service_s, per_unit_s=0.0, tail_ratio=1.3), Gamma(CV2),
                inputs=inputs[h.service.name], outputs=outputs[h.service.name],
            )
            for h in problem.services
        },
        pipelines={demand.name: _pipeline(demand) for demand in problem.demands},
        links={
            pair: Link(latency_s=latency, bandwidth_bytes_per_s=problem.bandwidths[pair])
            for pair, latency in problem.latencies_s.items()
        },
        gateway_node=next(iter(problem.demands[0].entry)),
    )  # fmt: skip


def _pipeline(demand: Demand) -> Pipeline:
    steps = tuple(
        Step(
            id=visit.id,
            service=visit.service,
            inputs={
                edge.source or REQUEST: f"{edge.source}.out" if edge.source else f"{REQUEST}.{visit.id}"
                for edge in demand.edges
                if edge.target == visit.id
            },
        )
        for visit in demand.visits
    )
    return Pipeline(
        name=demand.name, deadline_s=demand.deadline_s, epsilon=0.05, steps=steps, outputs={"answer": f"{steps[-1].id}.answer"}
    )


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
