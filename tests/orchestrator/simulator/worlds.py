"""Small simulated worlds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadgen import arrivals
from models.manifest import ServiceLaw
from orchestrator.core import Node, Placement, Service, Target
from orchestrator.scaling.manual import Manual
from orchestrator.scaling.site import Site
from orchestrator.simulator import run as simulations
from orchestrator.simulator.laws import Gamma
from orchestrator.simulator.run import Run
from orchestrator.simulator.world import Stage, World
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Link

MIB = 2**20


def stage(name: str, mean_s: float, cv2: float = 0.0, **options: Any) -> Stage:
    """A stage of one input x and one output x; its law takes `mean_s` for a batch of any size unless options say otherwise."""
    options.setdefault("law", ServiceLaw(base_s=mean_s, per_unit_s=0.0, tail_ratio=1.0 + 2.0 * cv2))
    return Stage(service=Service(name, "light", 1.0, MIB), noise=Gamma(cv2), **options)


def chain(name: str, *services: str, deadline_s: float = 0.5) -> Pipeline:
    """One step after the other."""
    sources = ["request.x", *(f"s{i}.x" for i in range(len(services)))]
    steps = tuple(Step(id=f"s{i}", service=service, inputs={"x": sources[i]}) for i, service in enumerate(services))
    return Pipeline(name=name, deadline_s=deadline_s, epsilon=0.05, steps=steps, outputs={"x": sources[-1]})


def fork(name: str, left: str, right: str, join: str, deadline_s: float = 0.5) -> Pipeline:
    """Two branches that run at once and meet."""
    steps = (
        Step(id="left", service=left, inputs={"x": "request.x"}),
        Step(id="right", service=right, inputs={"x": "request.y"}),
        Step(id="join", service=join, inputs={"x": "left.x", "y": "right.x"}),
    )
    return Pipeline(name=name, deadline_s=deadline_s, epsilon=0.05, steps=steps, outputs={"x": "join.x"})


def world(stages: list[Stage], pipelines: list[Pipeline], nodes: int = 1, cpus: float = 64.0, **options: Any) -> World:
    """So many equal nodes, n0 with the gateway."""
    return World(
        nodes=tuple(Node(f"n{i}", cpus, 1024 * MIB) for i in range(nodes)),
        stages={each.service.name: each for each in stages},
        pipelines={pipeline.name: pipeline for pipeline in pipelines},
        **options,
    )


def meshed(nodes: int, latency_s: float, bytes_per_s: float) -> dict[tuple[str, str], Link]:
    """Every node linked to every other."""
    link = Link(latency_s=latency_s, bandwidth_bytes_per_s=bytes_per_s)
    return {(f"n{a}", f"n{b}"): link for a in range(nodes) for b in range(nodes) if a != b}


def static(where: World, targets: Mapping[str, Target]) -> Manual:
    """The policy that keeps these targets."""
    return Manual(Site(tuple(where.services.values()), where.nodes, targets))


def simulate(
    where: World,
    workload: Mapping[str, str],
    targets: Mapping[str, Target],
    *,
    duration_s: float,
    initial: Placement | None = None,
    **options: Any,
) -> Run:
    """Run the static policy; from its own placement, or another one."""
    policy = static(where, targets)
    return simulations.run(
        where,
        "static",
        policy,
        {name: arrivals.parse(spec) for name, spec in workload.items()},
        initial=policy.place(targets, None) if initial is None else initial,
        duration_s=duration_s,
        slot_s=options.pop("slot_s", 1.0),
        seed=options.pop("seed", 1),
        **options,
    )
