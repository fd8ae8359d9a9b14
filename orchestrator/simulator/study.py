"""A scenario taken apart into runs, and one of them done: pure functions of a study, for any process to call.

    scenario ─► settings (case, load, seed) ─► placements, one per setting and method ─► rows, one per setting and policy

Rows are JSON objects: `run.Row`, with what tells the row from others of its report.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from loadgen import arrivals
from loadgen.arrivals import ArrivalProcess
from models.manifest import ServiceLaw
from orchestrator.core import Decision, Node, Observation, Placement, ScalingPolicy, Service, Target
from orchestrator.costs import Prices
from orchestrator.errors import UsageError
from orchestrator.placement import greedy
from orchestrator.placement.survey import mean_rate
from orchestrator.plan import Plan
from orchestrator.scaling import oracle, policies
from orchestrator.scaling.site import Site
from orchestrator.simulator import families, initial, laws
from orchestrator.simulator import world as worlds
from orchestrator.simulator.faults import Loss
from orchestrator.simulator.initial import Method, Sizing, Start
from orchestrator.simulator.laws import Gamma
from orchestrator.simulator.run import TOO_LATE, arrival_times, run
from orchestrator.simulator.scenario import Entry, LossSection, Scenario, Written, WrittenPipeline, cases, entries, paper_of
from orchestrator.simulator.sites import site_of
from orchestrator.simulator.world import Delays, Stage, World
from services.dataplane.pipeline import REQUEST, Pipeline, Step
from services.dataplane.routes import Link

S = TypeVar("S")

FORESIGHT_S = 0.05
"""Step of what the oracle is told; shorter where slots are."""
SAMPLE_SEED = 10**6
"""Added to the seed of the load that InferLine's planner is shown: the same law, other tasks."""
SERIES = frozenset({"recovery", "steady"})
"""Claims that need to know every slot."""


@dataclass(frozen=True, slots=True)
class Study:
    """A scenario, and what no seed changes of its world."""

    scenario: Scenario
    world: World | None = None
    """None: drawn by the seed."""
    start: Start | None = None
    """What a world that says its replicas begins with."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One world under one load."""

    case: Mapping[str, Any]
    load: float
    seed: int


def study_of(scenario: Scenario, plan: Plan | None = None) -> Study:
    """A study of a scenario; with the testbed's plan where the scenario's world is a testbed.

    Raises:
        SetupFailed: a stage has no profile.
        Infeasible: the replicas that the world asks for do not fit.
        UsageError: the workload is of pipelines that the world does not have.
    """
    if scenario.world.paper is not None:
        return Study(scenario)
    if plan is not None:
        world = worlds.of_testbed(plan.testbed, plan.manifests, plan.wiring, Delays(metric_lag_s=scenario.metric_lag))
        targets = plan.testbed.targets()
    else:
        assert scenario.world.written is not None
        world = written(scenario.world.written, scenario.metric_lag)
        targets = {name: Target(s.replicas, s.standby) for name, s in scenario.world.written.services.items()}
    for name in scenario.workload if isinstance(scenario.workload, Mapping) else ():
        if name not in world.pipelines:
            raise UsageError(f"the workload is of a pipeline {name!r}; there are {', '.join(world.pipelines)}")
    latencies = {pair: link.latency_s for pair, link in world.links.items()}
    services = tuple(world.services.values())
    placement = greedy.place(services, world.nodes, targets, flows=world.flows, latencies_s=latencies)
    return Study(scenario, world, Start(placement, targets, 1.0))


def settings(scenario: Scenario) -> tuple[Setting, ...]:
    """All settings, in the order of the report."""
    seeds = range(1, scenario.seeds + 1)
    return tuple(Setting(*each) for each in itertools.product(cases(scenario), scenario.loads, seeds))


def methods(scenario: Scenario) -> tuple[Method, ...]:
    """Who places the core tier, for any of the entries; none where the world says its replicas."""
    if scenario.placement is None:
        return ()
    return tuple(dict.fromkeys(entry.placement or scenario.placement.core for entry in entries(scenario)))


# --- one setting ----------------------------------------------------------------------------------------------------------


def place(study: Study, setting: Setting, method: Method) -> Start:
    """What runs at the beginning.

    Raises:
        Infeasible: the core tier has no place even for a tenth of the load.
    """
    section = study.scenario.placement
    assert section is not None
    sizing = Sizing(section.margin, section.kappa, section.gamma, section.beta, section.standby)
    world, workload = _drawn(study, setting)
    rates = {name: mean_rate(process) for name, process in workload.items()}
    return initial.place(world, rates, method, sizing, setting.seed)


def row(study: Study, setting: Setting, entry: Entry, start: Start) -> dict[str, Any]:
    """One run.

    Raises:
        UsageError: the policy does not take these options.
    """
    scenario = study.scenario
    world, workload = _drawn(study, setting)
    schedule = arrival_times(workload, setting.seed, scenario.duration)
    site = site_of(world, start.targets, scenario.slot, stale_after_s=max(5.0 * scenario.slot, 5.0 * scenario.metric_lag))
    watched = Watched(_policy(entry, site, schedule, workload, setting.seed, scenario), scenario.warmup, entry.spend_standby)
    done = run(
        world,
        entry.policy,
        watched,
        workload,
        initial=start.placement,
        duration_s=scenario.duration,
        slot_s=scenario.slot,
        seed=setting.seed,
        warmup_s=scenario.warmup,
        schedule=schedule,
        losses=[_loss(each, world, start.placement, setting.seed) for each in scenario.faults],
        ingredients=entry.ingredients,
        load=setting.load,
        options=entry.options,
    )
    found = {
        **done.row.as_dict(),
        "label": entry.label,
        "family": entry.family,
        "role": entry.role,
        "case": dict(setting.case),
        "planned": start.planned,
        "core_cost": _core_cost(world, start.targets, scenario.duration - scenario.warmup),
        "backlog": watched.backlog,
        "virtual_queue": watched.virtual_queue,
    }
    if any(claim.claim in SERIES for claim in scenario.claims) or "response" in scenario.plots:
        found["series"] = watched.series()
    return found


def task_stages(study: Study, setting: Setting) -> float:
    """Tasks times the stages that each visits: what a run has to do, on average."""
    world, workload = _drawn(study, setting)
    steps = {name: len(pipeline.steps) for name, pipeline in world.pipelines.items()}
    return study.scenario.duration * sum(mean_rate(process) * steps[name] for name, process in workload.items())


def _core_cost(world: World, targets: Mapping[str, Target], measured_s: float) -> float:
    """What the core tier costs when nothing is lost: the same under every policy."""
    cores = sum(s.cpus * targets[name].replicas for name, s in world.services.items() if s.tier == "core" and name in targets)
    return cores * world.prices.cpu_second * measured_s


def _drawn(study: Study, setting: Setting) -> tuple[World, dict[str, ArrivalProcess]]:
    """The world of a setting, and the laws of its arrivals at its load."""
    scenario = study.scenario
    if study.world is not None:
        assert isinstance(scenario.workload, Mapping)
        laws_of = {name: arrivals.parse(spec) for name, spec in scenario.workload.items()}
        return study.world, {name: arrivals.scaled(law, setting.load) for name, law in laws_of.items()}
    case = _case(paper_of(scenario, setting.case).model_dump_json(), setting.seed)
    delays = dataclasses.replace(case.world.delays, metric_lag_s=scenario.metric_lag)
    world = dataclasses.replace(case.world, delays=delays)
    if isinstance(scenario.workload, str):
        law = arrivals.parse(scenario.workload)
        return world, {name: arrivals.scaled(law, rate * setting.load) for name, rate in case.rates.items()}
    return world, {name: arrivals.scaled(arrivals.parse(spec), setting.load) for name, spec in scenario.workload.items()}


@lru_cache(maxsize=4)
def _case(options: str, seed: int) -> families.Case:
    """Runs of one setting come one after the other, and draw the same world."""
    return families.draw(families.Paper.model_validate_json(options), seed)


def _loss(section: LossSection, world: World, placement: Placement, seed: int) -> Loss:
    gateway = world.gateway_node or world.nodes[0].name
    others = [node.name for node in world.nodes if node.name != gateway]
    node = section.node
    if node == "drawn":
        node = str(laws.stream(seed, "study/loss").choice(others))
    elif node == "busiest":
        cpus = {name: service.cpus for name, service in world.services.items()}
        node = max(others, key=lambda name: (sum(cpus[s] * placement.ready_on(s, name) for s in cpus), name))
    return Loss(node, section.at) if section.back is None else Loss(node, section.at, section.back)


# --- policies -------------------------------------------------------------------------------------------------------------


def _policy(
    entry: Entry,
    site: Site,
    schedule: Mapping[str, Sequence[float]],
    workload: Mapping[str, ArrivalProcess],
    seed: int,
    scenario: Scenario,
) -> ScalingPolicy[Any]:
    options = dict(entry.options)
    known = {each.name for each in dataclasses.fields(policies.POLICIES[entry.policy])}  # type: ignore[arg-type]
    # A controller that plans with an ingredient must know that it is off.
    for ingredient in ("standby", "let_out"):
        if ingredient in known and not getattr(entry.ingredients, ingredient):
            options[ingredient] = False
    visited = {name: oracle.visits(promise, site.laws) for name, promise in site.promises.items()}
    if entry.policy == "oracle":
        step_s = min(FORESIGHT_S, scenario.slot)
        options |= {"arrivals": oracle.foresight(schedule, visited, step_s), "step_s": step_s}
    if entry.policy == "inferline":
        sample = arrival_times(workload, seed + SAMPLE_SEED, scenario.duration)
        options["sample"] = oracle.foresight(sample, visited, scenario.slot)
    return policies.make(entry.policy, site, **options)


class Watched(Generic[S]):
    """A policy, and what it sees: its decisions are the policy's own.

    Args:
        policy: who decides.
        from_s: the backlog is averaged from then on [s].
        spend_standby: the data plane may let out all standbys that the policy orders, for policies that know no allowance.
    """

    def __init__(self, policy: ScalingPolicy[S], from_s: float, spend_standby: bool) -> None:
        self._policy, self._from_s, self._spend = policy, from_s, spend_standby
        self._queues: list[float] = []
        self._virtual: list[float] = []
        self._slots: list[dict[str, float]] = []
        self._last: dict[str, tuple[int, int]] = {}

    @property
    def state_type(self) -> type[S]:
        """See ScalingPolicy."""
        return self._policy.state_type

    def initial(self) -> S:
        """See ScalingPolicy."""
        return self._policy.initial()

    def step(self, state: S, observation: Observation) -> tuple[S, Decision]:
        """See ScalingPolicy."""
        self._record(observation)
        state, decision = self._policy.step(state, observation)
        virtual: Mapping[str, float] | None = getattr(state, "virtual_queues", None)
        if virtual and observation.t >= self._from_s:
            self._virtual.append(sum(virtual.values()))
        if self._spend and decision.desired is not None:
            allowance = {name: sum(on_nodes.values()) for name, on_nodes in decision.desired.standby.items()}
            decision = dataclasses.replace(decision, desired=dataclasses.replace(decision.desired, allowance=allowance))
        return state, decision

    @property
    def backlog(self) -> float | None:
        """Tasks in all queues, averaged over the slots of the measured part."""
        return sum(self._queues) / len(self._queues) if self._queues else None

    @property
    def virtual_queue(self) -> float | None:
        """Broken promises that the policy remembers, averaged over the same slots [tasks]; None of one that remembers none."""
        return sum(self._virtual) / len(self._virtual) if self._virtual else None

    def series(self) -> dict[str, list[float]]:
        """What was seen at the beginning of each slot; tasks are those that ended in the slot before.

        Keys: `t` [s], `ready` and `standby` (replicas), `changed` (services with another number of either than a slot before),
        `queue` (tasks), `ended` and `late` (tasks).
        """
        return {key: [slot[key] for slot in self._slots] for key in (self._slots[0] if self._slots else ())}

    def _record(self, observation: Observation) -> None:
        counts = {
            name: (
                sum(states.get("ready", 0) for states in service.replicas.values()),
                sum(states.get("standby", 0) + states.get("starting", 0) for states in service.replicas.values()),
            )
            for name, service in observation.services.items()
        }
        queue = sum(
            service.signal.queue_length or 0.0 for service in observation.services.values() if service.signal is not None
        )
        outcomes = [pipeline.outcomes for pipeline in observation.pipelines.values()]
        self._slots.append(
            {
                "t": observation.t,
                "ready": sum(ready for ready, _ in counts.values()),
                "standby": sum(standby for _, standby in counts.values()),
                "changed": sum(self._last.get(name, now) != now for name, now in counts.items()),
                "queue": queue,
                "ended": sum(sum(each.values()) for each in outcomes),
                "late": sum(count for each in outcomes for outcome, count in each.items() if outcome in TOO_LATE),
            }
        )
        self._last = counts
        if observation.t >= self._from_s:
            self._queues.append(queue)


# --- worlds written out ---------------------------------------------------------------------------------------------------


def written(section: Written, metric_lag_s: float) -> World:
    """The world that a scenario file writes out."""
    stages = {
        name: Stage(
            service=Service(name, s.tier, s.cpus, s.memory, s.floor, s.nodes),
            law=ServiceLaw(base_s=s.mean - s.per_task, per_unit_s=s.per_task, tail_ratio=1.0 + 2.0 * s.cv2),
            noise=Gamma(s.cv2),
            slots=s.slots,
            max_batch=s.max_batch,
            queue_capacity=s.queue_capacity,
            start_s=s.start,
            inputs={"x": float(s.input)},
            outputs={"y": float(s.output)},
        )
        for name, s in section.services.items()
    }
    both = [(link.between, Link(latency_s=link.latency, bandwidth_bytes_per_s=link.bandwidth)) for link in section.links]
    return World(
        nodes=tuple(Node(name, node.cpus, node.memory, node.gpus) for name, node in section.nodes.items()),
        stages=stages,
        pipelines={name: _pipeline(name, pipeline) for name, pipeline in section.pipelines.items()},
        links={pair: link for (a, b), link in both for pair in ((a, b), (b, a))},
        gateway_node=section.gateway or next(iter(section.nodes)),
        speeds={name: node.speed for name, node in section.nodes.items()},
        delays=Delays(metric_lag_s=metric_lag_s),
        prices=Prices(section.costs.cpu_second, section.costs.standby_fraction, section.costs.start),
    )


def _pipeline(name: str, section: WrittenPipeline) -> Pipeline:
    taken = {parent for step in section.steps for parent in step.after}
    steps = tuple(
        Step(
            id=step.id,
            service=step.service,
            inputs={f"x-{parent}": f"{parent}.y" for parent in step.after} or {"x": f"{REQUEST}.x"},
        )
        for step in section.steps
    )
    outputs = {f"y-{step.id}": f"{step.id}.y" for step in section.steps if step.id not in taken}
    return Pipeline(name=name, deadline_s=section.deadline, epsilon=section.epsilon, steps=steps, outputs=outputs)
