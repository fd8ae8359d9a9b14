"""Pipelines and workloads as the demand of a placement problem: light stages become delay on the edges they lie on."""

from __future__ import annotations

from collections.abc import Mapping

from loadgen import arrivals
from models.manifest import StageSpec
from orchestrator.placement.problem import Demand, Edge, Visit
from services.dataplane.pipeline import REQUEST, Pipeline, Step, name_of, step_of, topological

HORIZON_S = 3600.0
"""Over which a rate is averaged that does not say its mean [s]."""


def mean_rate(process: arrivals.ArrivalProcess) -> float:
    """Mean arrival rate of a process [tasks/s]; of a trace or steps, over its own length."""
    match process:
        case arrivals.Mmpp():
            return sum(s.rate * s.sojourn_s for s in process.states) / sum(s.sojourn_s for s in process.states)
        case arrivals.Step():
            return sum(d * rate for d, rate in process.pieces) / process.duration_s
        case arrivals.Poisson() | arrivals.Constant() | arrivals.Gamma() | arrivals.Diurnal():
            return process.rate
    length = arrivals.natural_s(process) or HORIZON_S
    return len(process.times(arrivals.stream(0, "plan", "arrivals"), length)) / length


def demand_of(
    pipeline: Pipeline, rate: float, gateway: str, stages: Mapping[str, StageSpec], times: Mapping[str, float]
) -> Demand:
    """A pipeline as the program sees it: visits of core services, with light stages folded into the edges between them.

    The further parts of a decoder are visited after the first, once a task: what they pass on token by token counts as often
    as the prompt has tokens.
    """
    steps = {step.id: step for step in topological(pipeline.steps)}
    core = [step for step in steps.values() if stages[step.service].tier == "core"]
    edges: list[Edge] = []
    for target in [*core, None]:
        for source, (size, delay) in _sources(target, pipeline, steps, stages, times).items():
            if source != REQUEST or target is not None:
                edges.append(Edge(None if source == REQUEST else source, target.id if target else None, size, delay))
    visits: list[Visit] = []
    for step in core:
        visits.append(Visit(step.id, step.service))
        for part in step.parts:
            edges.append(Edge(visits[-1].id, f"{step.id} in {part}", float(stages[part].inputs[0].bytes_per_item)))
            visits.append(Visit(f"{step.id} in {part}", part))
    return Demand(pipeline.name, rate, pipeline.deadline_s, tuple(visits), tuple(edges), {gateway: 1.0})


def _sources(
    target: Step | None,
    pipeline: Pipeline,
    steps: Mapping[str, Step],
    stages: Mapping[str, StageSpec],
    times: Mapping[str, float],
) -> dict[str, tuple[float, float]]:
    """Core steps (or the request) that feed a core step (or the answer) through light ones: bytes [bytes], delay [s].

    A light stage can run at either end, so of the hops on a way the smallest counts; of several ways the largest and slowest.
    """
    found: dict[str, tuple[float, float]] = {}

    def back(refs: tuple[str, ...], taker: Step | None, size: float, delay: float) -> None:
        for parent in dict.fromkeys(step_of(ref) for ref in refs):
            crossing = sum(_bytes(ref, taker, steps, stages) for ref in dict.fromkeys(refs) if step_of(ref) == parent)
            least = min(size, crossing)
            if parent == REQUEST or stages[steps[parent].service].tier == "core":
                known = found.get(parent, (0.0, 0.0))
                found[parent] = (max(known[0], least), max(known[1], delay))
            else:
                step = steps[parent]
                back(tuple(step.inputs.values()), step, least, delay + times[step.service])

    back(tuple(target.inputs.values()) if target else tuple(pipeline.outputs.values()), target, float("inf"), 0.0)
    return found


def _bytes(ref: str, taker: Step | None, steps: Mapping[str, Step], stages: Mapping[str, StageSpec]) -> float:
    """Bytes of one item of a reference; a tensor of the request is as large as whoever takes it says."""
    if step_of(ref) != REQUEST:
        tensors = stages[steps[step_of(ref)].service].outputs
        return float(next(t.bytes_per_item for t in tensors if t.name == name_of(ref)))
    if taker is None:
        return 0.0
    names = [name for name, source in taker.inputs.items() if source == ref]
    return float(max(t.bytes_per_item for t in stages[taker.service].inputs if t.name in names))
