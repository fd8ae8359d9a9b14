"""A testbed and its models, read as a placement problem: what `espalier plan` solves, and where a running testbed begins.

Core services are placed by the program. Light ones are a reserve, and delay on the edges they lie on (`placement.survey`).
Where a stage has a profile its service law is used, else an assumption, which is named in the result.
"""

from __future__ import annotations

import asyncio
import logging
import math
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace

from loadgen import arrivals
from models.manifest import Manifest, ServiceLaw, ServicePoint, StageProfile
from orchestrator import plan as plans
from orchestrator.core import Placement, Service
from orchestrator.errors import EspalierError, Infeasible, UsageError
from orchestrator.placement import heuristics
from orchestrator.placement.problem import MIB, Hosted, Parameters, Problem
from orchestrator.placement.survey import demand_of, mean_rate
from orchestrator.testbed import Testbed

log = logging.getLogger(__name__)

ASSUMED_SERVICE_S = {"core": 0.020, "light": 0.002}
"""Mean service time of a stage without a profile [s],"""
ASSUMED_LOAD_S, ASSUMED_TAIL = 0.5, 1.5
"""the time it loads [s], and the ratio of its 95 % quantile to its mean."""
LASTING_S = 60.0
"""How long a placement should last [s]: a start is paid for over that time."""
START_LIMIT_S = 5.0
"""How long the program may take where a running testbed waits for it [s],"""
LOAD_LIMIT_S = 15.0
"""and how long it may take to load the solver [s]."""
MANUAL = "manual"
"""The policy under which replicas are as many as the testbed or the operator says."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The problem, and what it took for granted."""

    problem: Problem
    manifests: Mapping[str, Manifest]
    """With a profile of every stage that is served, measured or assumed."""
    service_s: Mapping[str, float]
    """By service, mean time of one task alone [s]."""
    rates: Mapping[str, float]
    """Demand by pipeline [tasks/s]."""
    assumptions: tuple[str, ...]


def survey(made: plans.Plan, rates: Mapping[str, float] | None = None, parameters: Parameters | None = None) -> Survey:
    """The problem of a testbed.

    Args:
        made: the testbed with its models.
        rates: demand by pipeline [tasks/s]; default: the means of the testbed's workload.
        parameters: default: `defaults` of the testbed.

    Raises:
        UsageError: a rate is given for a pipeline that there is not, or is negative, or there is no core service.
    """
    testbed, assumptions = made.testbed, list[str]()
    manifests = _profiled(made, assumptions)
    stages = {name: manifests[s.model].stage(s.stage) for name, s in testbed.services.items()}
    times = {name: _service_s(name, testbed, manifests) for name in testbed.services}
    services = made.services()
    core = [service for service in services.values() if service.tier == "core"]
    if not core:
        raise UsageError("the testbed has no core service, so there is nothing for the program to place")
    hosted = tuple(Hosted(s, times[s.name], 1 / times[s.name], testbed.services[s.name].replicas) for s in core)
    demand = _rates(testbed, rates, assumptions)
    nodes = made.present()
    names = [node.name for node in nodes]
    entries = [node for node in testbed.gateway_nodes if node in names] or names[:1]
    entry = {node: 1.0 / len(entries) for node in entries}
    demands = [
        replace(demand_of(made.wiring.pipelines[name], rate, testbed.gateway_node, stages, times), entry=entry)
        for name, rate in demand.items()
        if rate > 0
    ]
    both = {pair: link for link in testbed.links for pair in (link.between, link.between[::-1])}
    problem = Problem(
        nodes=nodes,
        services=hosted,
        demands=tuple(demand for demand in demands if demand.visits),
        latencies_s={pair: link.latency for pair, link in both.items()},
        bandwidths={pair: link.bandwidth for pair, link in both.items()},
        reserve=_reserve(testbed, services),
        parameters=parameters or defaults(testbed, len(nodes)),
    )
    return Survey(problem, manifests, times, demand, tuple(assumptions))


def defaults(testbed: Testbed, nodes: int | None = None) -> Parameters:
    """Parameters at the testbed's prices; on a single node nothing can survive its loss, so nothing is asked for.

    Args:
        testbed: with the prices.
        nodes: that are there; default: all of the testbed's.
    """
    alone, prices = (len(testbed.nodes) if nodes is None else nodes) == 1, testbed.control.costs
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


def _profiled(made: plans.Plan, assumptions: list[str]) -> dict[str, Manifest]:
    """The manifests with a profile of every stage that is served; what is assumed takes as long for each task of a batch."""
    found = dict(made.manifests)
    for name, section in made.testbed.services.items():
        stage = found[section.model].stage(section.stage)
        if section.precision in stage.profile:
            continue
        mean_s = ASSUMED_SERVICE_S[stage.tier]
        assumptions.append(f"{name} has no profile: {mean_s * 1e3:g} ms a task taken (espalier profile measures it)")
        units = _units_alone(found[section.model], section.stage)
        point = ServicePoint(
            batch=1, length=1, samples=1, mean_s=mean_s, std_s=0.0, p50_s=mean_s, p95_s=mean_s * ASSUMED_TAIL,
            p99_s=mean_s * ASSUMED_TAIL,
        )  # fmt: skip
        profile = StageProfile(
            points=(point,), law=ServiceLaw(base_s=0.0, per_unit_s=mean_s / units, tail_ratio=ASSUMED_TAIL),
            resident_bytes=section.memory, load_s=ASSUMED_LOAD_S, threads=1, cpu="assumed",
        )  # fmt: skip
        stages = tuple(
            s.model_copy(update={"profile": {**s.profile, section.precision: profile}}) if s.name == stage.name else s
            for s in found[section.model].stages
        )
        found[section.model] = found[section.model].model_copy(update={"stages": stages})
    return found


def _service_s(name: str, testbed: Testbed, manifests: Mapping[str, Manifest]) -> float:
    """Mean time of one task alone (batch 1, typical lengths) [s]: what batching gains is left as a margin."""
    section = testbed.services[name]
    manifest = manifests[section.model]
    law = manifest.stage(section.stage).profile[section.precision].law
    return law.mean_s(_units_alone(manifest, section.stage))


def _units_alone(manifest: Manifest, name: str) -> int:
    """Size of one task, at typical lengths."""
    return math.prod(manifest.lengths(manifest.stage(name).inputs[0]))


def _reserve(testbed: Testbed, services: Mapping[str, Service]) -> tuple[float, float, float]:
    light = [testbed.services[name] for name, service in services.items() if service.tier == "light"]
    loaded = [(s.replicas + s.standby, s) for s in light]
    return (
        sum(s.replicas * s.cpus for s in light),
        sum(count * s.memory for count, s in loaded) / MIB,
        float(sum(count * s.gpus for count, s in loaded)),
    )


# --- where a running testbed begins ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CorePlacement:
    """Ready replicas of the core services, and who says so."""

    placement: Placement
    by: str
    """`program`, or the heuristic's name."""
    reason: str


async def settled(made: plans.Plan, current: Placement | None = None) -> plans.Plan:
    """The plan with its core services placed for the testbed's workload; as it is where they are scaled by hand, or do not fit.

    Args:
        made: the testbed with its models.
        current: what runs; moves are charged for, but from nodes that are absent.
    """
    if made.testbed.control.policy.name == MANUAL or "core" not in made.wiring.tiers.values():
        return made
    try:
        found = await core_placement(survey(made), current.without(made.absent) if current is not None else None)
    except Infeasible as error:
        log.warning("core services: as many as the testbed says, placed greedily, since its workload does not fit: %s", error)
        return made
    log.info("core services: placed by %s: %s", found.by, found.reason)
    return replace(made, placed=found.placement.ready)


async def core_placement(
    found: Survey, current: Placement | None = None, *, limit_s: float = START_LIMIT_S, gap: float = 0.01
) -> CorePlacement:
    """Where the core services of a testbed should run, in time for one that waits: the program's word, else the heuristic's.

    On a single node there is nothing to choose. Elsewhere another process does: the solver takes seconds to load,
    and memory that an orchestrator would keep for good.

    Args:
        found: of `survey`, with the demand.
        current: what runs; moves are charged for.
        limit_s: of the solver [s].
        gap: largest (cost - bound) / cost.

    Raises:
        Infeasible: not even the heuristic finds room.
    """
    greedy = heuristics.near(found.problem, current)
    if len(found.problem.nodes) == 1:
        return CorePlacement(greedy, "greedy", "there is one node")
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        asked = asyncio.get_running_loop().run_in_executor(pool, _choose, found.problem, greedy, current, limit_s, gap)
        return await asyncio.wait_for(asked, limit_s + LOAD_LIMIT_S)
    except (EspalierError, BrokenExecutor, TimeoutError) as error:
        said = str(error) or type(error).__name__
        return CorePlacement(greedy, "greedy", f"the program found nothing, so the greedy heuristic placed: {said}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _choose(problem: Problem, greedy: Placement, current: Placement | None, limit_s: float, gap: float) -> CorePlacement:
    """The heuristic's placement, if it keeps every rule and costs little more than its replicas must; else the program's."""
    from orchestrator.placement import flows  # noqa: PLC0415  only a process that has to choose loads scipy,

    cost = flows.cost_of(problem, problem.arrays.counts(greedy), current)
    least = flows.least_rent(problem)
    x = problem.arrays.counts(greedy)
    if cost - least <= gap * cost and flows.keeps(problem, x, flows.survivors(problem, x)):
        return CorePlacement(greedy, "greedy", f"greedy is within {gap:.0%} of the least that its replicas may cost")
    from orchestrator.placement.program import Limits, Program  # noqa: PLC0415  and the solver only where it is asked

    solution = Program(problem, Limits(time_s=limit_s, gap=gap)).solve(current)
    by = solution.status if solution.status in ("greedy", "spread") else "program"
    said = "no bound is known" if solution.gap is None else f"at most {solution.gap:.2%} above the best possible"
    return CorePlacement(solution.placement, by, f"{solution.status} after {solution.solve_s:.2f} s, {said}")
