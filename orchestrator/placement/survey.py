"""A testbed and its models, read as a placement problem: what `espalier plan` solves.

Core services are placed by the program. Light ones are the reserve, and delay on the edges they lie on. Where a stage has a
profile its service law is used, else an assumption, which is named in the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loadgen import arrivals
from models.manifest import Manifest, StageSpec
from orchestrator.errors import UsageError
from orchestrator.placement.problem import MIB, Demand, Edge, Hosted, Parameters, Problem, Visit
from orchestrator.testbed import Testbed
from services.dataplane.pipeline import REQUEST, Pipeline, Step, name_of, step_of, topological

ASSUMED_SERVICE_S = {"core": 0.020, "light": 0.002}
"""Mean service time of a stage without a profile [s]."""
LASTING_S = 60.0
"""How long a placement should last [s]: a start is paid for over that time."""
HORIZON_S = 3600.0
"""Over which a rate is averaged that does not say its mean [s]."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The problem, and what it took for granted."""

    problem: Problem
    assumptions: tuple[str, ...]


def survey(
    testbed: Testbed,
    manifests: Mapping[str, Manifest],
    pipelines: Mapping[str, Pipeline],
    rates: Mapping[str, float] | None = None,
    parameters: Parameters | None = None,
) -> Survey:
    """The problem of a testbed.

    Args:
        testbed: as it was read.
        manifests: of its models, by name.
        pipelines: as they were wired.
        rates: demand by pipeline [tasks/s]; default: the means of the testbed's workload.
        parameters: default: `defaults` of the testbed.

    Raises:
        UsageError: a rate is given for a pipeline that there is not, or is negative, or there is no core service.
    """
    stages = {name: manifests[s.model].stage(s.stage) for name, s in testbed.services.items()}
    assumptions: list[str] = []
    times = {name: _service_s(name, testbed, manifests, stage, assumptions) for name, stage in stages.items()}
    tiers = {name: stage.tier for name, stage in stages.items()}
    core = [service for service in testbed.core_services(tiers) if service.tier == "core"]
    if not core:
        raise UsageError("the testbed has no core service, so there is nothing for the program to place")
    hosted = tuple(Hosted(s, times[s.name], 1 / times[s.name], testbed.services[s.name].replicas) for s in core)
    demands = [
        _demand(pipelines[name], rate, testbed.gateway_node, stages, times)
        for name, rate in _rates(testbed, rates, assumptions).items()
        if rate > 0
    ]
    both = {pair: link for link in testbed.links for pair in (link.between, link.between[::-1])}
    problem = Problem(
        nodes=testbed.core_nodes(),
        services=hosted,
        demands=tuple(demand for demand in demands if demand.visits),
        latencies_s={pair: link.latency for pair, link in both.items()},
        bandwidths={pair: link.bandwidth for pair, link in both.items()},
        reserve=_reserve(testbed, tiers),
        parameters=parameters or defaults(testbed),
    )
    return Survey(problem, tuple(assumptions))


def defaults(testbed: Testbed) -> Parameters:
    """Parameters at the testbed's prices; on a single node nothing can survive its loss, so nothing is asked for."""
    alone, prices = len(testbed.nodes) == 1, testbed.control.costs
    return Parameters(
        kappa=1 if alone else 2, gamma=0.0 if alone else 0.5, cpu_price=prices.cpu_second, move_price=prices.start / LASTING_S
    )


def _rates(testbed: Testbed, given: Mapping[str, float] | None, assumptions: list[str]) -> dict[str, float]:
    if given is not None:
        for name, rate in given.items():
            if name not in testbed.pipelines:
                raise UsageError(f"there is no pipeline {name!r}; there are {', '.join(testbed.pipelines)}")
            if rate < 0:
                raise UsageError(f"the demand of {name} is {rate:g} tasks/s; it must not be negative")
        return dict(given)
    if not testbed.workload:
        assumptions.append("the testbed has no workload, so replicas are those it asks for, and no load flows")
    return {name: mean_rate(arrivals.parse(spec)) for name, spec in testbed.workload.items()}


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


def _service_s(
    name: str, testbed: Testbed, manifests: Mapping[str, Manifest], stage: StageSpec, assumptions: list[str]
) -> float:
    """Mean time of one task alone (batch 1, typical lengths) [s]: what batching gains is left as a margin."""
    section = testbed.services[name]
    profile = stage.profile.get(section.precision)
    if profile is None:
        assumed = ASSUMED_SERVICE_S[stage.tier]
        assumptions.append(f"{name} has no profile: {assumed * 1e3:g} ms a task taken (espalier profile measures it)")
        return assumed
    typical = manifests[section.model].typical_length
    shape = [axis if isinstance(axis, int) else typical.get(axis, 1) for axis in stage.inputs[0].shape]
    return profile.law.mean_s(stage.units(shape))


def _reserve(testbed: Testbed, tiers: Mapping[str, str]) -> tuple[float, float, float]:
    light = [s for name, s in testbed.services.items() if tiers[name] == "light"]
    loaded = [(s.replicas + s.standby, s) for s in light]
    return (
        sum(s.replicas * s.cpus for s in light),
        sum(count * s.memory for count, s in loaded) / MIB,
        float(sum(count * s.gpus for count, s in loaded)),
    )


# --- a pipeline with its light stages folded into the edges ---------------------------------------------------------------


def _demand(
    pipeline: Pipeline, rate: float, gateway: str, stages: Mapping[str, StageSpec], times: Mapping[str, float]
) -> Demand:
    steps = {step.id: step for step in topological(pipeline.steps)}
    core = [step for step in steps.values() if stages[step.service].tier == "core"]
    edges: list[Edge] = []
    for target in [*core, None]:
        for source, (size, delay) in _sources(target, pipeline, steps, stages, times).items():
            if source != REQUEST or target is not None:
                edges.append(Edge(None if source == REQUEST else source, target.id if target else None, size, delay))
    visits = tuple(Visit(step.id, step.service) for step in core)
    return Demand(pipeline.name, rate, pipeline.deadline_s, visits, tuple(edges), {gateway: 1.0})


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
