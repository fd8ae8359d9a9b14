"""What runs when a simulation begins: the core tier by the placement program or a baseline, light services in the room left.

A world drawn by a seed has no testbed file that says how many replicas there are. Here they follow from the load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from models.manifest import BATCH_AXIS, StageSpec, TensorSpec
from orchestrator.core import Placement, Target
from orchestrator.errors import Infeasible
from orchestrator.placement import greedy
from orchestrator.placement.baselines import BASELINES
from orchestrator.placement.problem import MIB, Hosted, Parameters, Problem
from orchestrator.placement.survey import demand_of
from orchestrator.scaling.autoscaler import clip
from orchestrator.scaling.site import Site
from orchestrator.simulator.world import Stage, World

Method = Literal["program", "random", "spread", "bin-pack", "greedy-latency", "genetic"]
SHRINK = 0.9
"""Where the core tier does not fit, this share of the load is tried, and so on."""
LEAST_SHARE = 0.1
PINNED_UTILISATION = 0.25
"""Of core services that may run on named nodes only: they are not placed, and not what is studied."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """How much is placed."""

    margin: float = 1.0
    """Core services are placed for so many times the mean load."""
    kappa: int = 2
    gamma: float = 0.5
    beta: float = 1.0
    """Light services begin with r + beta sqrt(r) replicas, r the mean load [erlang],"""
    standby: float = 0.5
    """and with so many standbys, as a share of r, rounded up."""
    gap: float = 0.05
    """At which the program stops."""
    time_limit_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """A placement, and the replicas that policies take for given."""

    placement: Placement
    targets: Mapping[str, Target]
    planned: float
    """Share of the load asked for that the core tier is placed for; below 1 where more does not fit."""


def place(world: World, rates: Mapping[str, float], method: Method, sizing: Sizing, seed: int) -> Start:
    """Replicas for a load.

    Args:
        world: what there is.
        rates: pipeline -> mean rate [tasks/s].
        method: who places the core tier.
        sizing: how much of everything.
        seed: of the methods that draw.

    Raises:
        Infeasible: the core tier has no place even for a tenth of the load.
    """
    planned, share = None, 1.0
    while planned is None:
        try:
            planned = _core(problem_of(world, rates, sizing, share), method, sizing, seed)
        except Infeasible:
            share *= SHRINK
            if share < LEAST_SHARE:
                raise
    core = Placement({name: row for name, row in planned.ready.items() if row})
    loads = offered(world, rates)
    wanted = {
        name: core.target(name) if name in core.ready else _unplaced(stage, loads[name], sizing)
        for name, stage in world.stages.items()
    }
    site = Site(tuple(world.services.values()), world.nodes, wanted)
    targets = clip(site, wanted, core)
    latencies = {pair: link.latency_s for pair, link in world.links.items()}
    placement = greedy.place(
        site.services, world.nodes, targets, flows=world.flows, latencies_s=latencies, keep=core
    )  # fmt: skip
    return Start(placement, targets, share)


def offered(world: World, rates: Mapping[str, float]) -> dict[str, float]:
    """Service -> mean load [erlang], on nodes of middling speed."""
    speed = sum(world.speeds.get(node.name, 1.0) for node in world.nodes) / len(world.nodes)
    visits = dict.fromkeys(world.stages, 0.0)
    for name, pipeline in world.pipelines.items():
        for step in pipeline.steps:
            visits[step.service] += rates.get(name, 0.0)
    return {name: visits[name] * _alone_s(stage) / speed / stage.slots for name, stage in world.stages.items()}


def problem_of(world: World, rates: Mapping[str, float], sizing: Sizing, share: float = 1.0) -> Problem:
    """The placement problem of a world's core tier, at the slowest node's speed."""
    slowest = min((world.speeds.get(node.name, 1.0) for node in world.nodes), default=1.0)
    gateway = world.gateway_node or world.nodes[0].name
    times = {name: _alone_s(stage) / slowest for name, stage in world.stages.items()}
    specs = {name: _spec(stage) for name, stage in world.stages.items()}
    hosted = [
        Hosted(stage.service, times[name], stage.slots / times[name])
        for name, stage in world.stages.items()
        if stage.service.tier == "core" and not stage.service.nodes
    ]
    factor, loads = sizing.margin * share, offered(world, rates)
    free = frozenset(h.service.name for h in hosted)
    demands = [
        demand_of(pipeline, rates[name] * factor, gateway, {n: _as_placed(s, n in free) for n, s in specs.items()}, times)
        for name, pipeline in world.pipelines.items()
        if rates.get(name, 0.0) > 0
    ]
    alone = len(world.nodes) == 1
    light = [(_unplaced(stage, loads[n] * share, sizing), stage.service) for n, stage in world.stages.items() if n not in free]
    return Problem(
        nodes=world.nodes,
        services=tuple(hosted),
        demands=tuple(demand for demand in demands if demand.visits),
        latencies_s={pair: link.latency_s for pair, link in world.links.items()},
        bandwidths={p: link.bandwidth_bytes_per_s for p, link in world.links.items() if link.bandwidth_bytes_per_s < math.inf},
        reserve=(
            sum(target.replicas * service.cpus for target, service in light),
            sum((target.replicas + target.standby) * service.memory_bytes for target, service in light) / MIB,
            float(sum((target.replicas + target.standby) * service.gpus for target, service in light)),
        ),
        parameters=Parameters(
            kappa=1 if alone else sizing.kappa, gamma=0.0 if alone else sizing.gamma, cpu_price=world.prices.cpu_second
        ),
    )


def _core(problem: Problem, method: Method, sizing: Sizing, seed: int) -> Placement:
    if not problem.services:
        return Placement()
    if method != "program":
        return BASELINES[method](problem, seed)
    # The solver takes most of a second to import, and most scenarios' workers never need it.
    from orchestrator.placement.program import Limits, Program  # noqa: PLC0415

    return Program(problem, Limits(time_s=sizing.time_limit_s, gap=sizing.gap)).solve().placement


def _unplaced(stage: Stage, load: float, sizing: Sizing) -> Target:
    if stage.service.tier == "core":
        return Target(max(stage.service.floor, math.ceil(load / PINNED_UTILISATION)))
    return Target(
        max(stage.service.floor, math.ceil(load + sizing.beta * math.sqrt(load))), math.ceil(sizing.standby * load)
    )  # fmt: skip


def _alone_s(stage: Stage) -> float:
    """Mean service time of a task alone, on a node of speed 1 [s]."""
    return stage.law.mean_s(math.prod(stage.lengths))


def _spec(stage: Stage) -> StageSpec:
    """A stage as a manifest would have it, for its tensors."""

    def tensors(sizes: Mapping[str, float]) -> tuple[TensorSpec, ...]:
        named = sizes or {"x": 0.0}
        return tuple(TensorSpec(name=n, datatype="FP32", shape=(BATCH_AXIS,), bytes_per_item=int(b)) for n, b in named.items())

    return StageSpec(
        name=stage.service.name, tier=stage.service.tier, processor="onnx",
        inputs=tensors(stage.inputs), outputs=tensors(stage.outputs),
    )  # fmt: skip


def _as_placed(spec: StageSpec, free: bool) -> StageSpec:
    """A core service that may run on one node only is no question to the program; it counts as delay, like a light one."""
    return spec if free or spec.tier == "light" else spec.model_copy(update={"tier": "light"})
