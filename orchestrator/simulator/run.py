"""One policy over one simulated testbed: every slot observe, decide, apply, as `orchestrator.runner` does in real time.

Pure: the same arguments give the same row, bit for bit, in every process. Policies that are given the same seed meet the same
tasks at the same times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from loadgen import arrivals
from loadgen.arrivals import ArrivalProcess
from loadgen.outcome import OUTCOMES, Outcome, TaskRecord
from orchestrator.core import Placement, ScalingPolicy
from orchestrator.costs import Cost
from orchestrator.simulator.faults import Fault, LinkFault, Loss, Silence
from orchestrator.simulator.ingredients import ALL, Ingredients
from orchestrator.simulator.kernel import Kernel
from orchestrator.simulator.testbed import SimulatedTestbed
from orchestrator.simulator.world import World

S = TypeVar("S")

TOO_LATE: frozenset[Outcome] = frozenset({"late", "expired", "rejected"})
"""Outcomes that a pipeline's epsilon is held against: answered too late, or dropped so as not to be."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a run. Tasks are those scheduled after the warm-up; cost and replicas are of the time after it."""

    policy: str
    options: Mapping[str, Any]
    """What tells this row from others of the policy: its options, and `ingredients` where not all are in use."""
    load: float
    """The factor by which the workload was scaled."""
    seed: int
    on_time_ratio: float | None
    """on_time / all tasks sent; None where none was."""
    late_ratio: float | None
    """late, expired and rejected / all tasks sent: what is held against `epsilon`."""
    epsilon: float | None
    """What the pipelines promise for the tasks that were sent: their epsilon, by each one's share of the tasks."""
    promised: Mapping[str, float] | None
    """Pipeline -> the P(late) that the policy reckoned with, averaged over its slots; None from one that reckons with none."""
    outcomes: Mapping[Outcome, int]
    cost: float
    replicas: float
    """Ready replicas of all services, averaged over time."""
    starts: int
    let_out: int
    """Standbys that the data plane put to work by itself."""
    pipelines: Mapping[str, Mapping[Outcome, int]]
    """Outcomes by pipeline."""
    late_by_pipeline: Mapping[str, float]
    """`late_ratio` of every pipeline that was sent any task."""
    epsilon_by_pipeline: Mapping[str, float]
    """What it is held against."""

    def as_dict(self) -> dict[str, Any]:
        """The row as one JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Run:
    """A row, and what it was made of."""

    row: Row
    cost: Cost
    records: tuple[TaskRecord, ...]
    """As the load generator keeps them; empty unless they were asked for."""
    events: int
    """Events of the kernel."""
    visits: int
    """Task-stages: tasks computed, counted at every stage."""


def arrival_times(workload: Mapping[str, ArrivalProcess], seed: int, horizon_s: float) -> dict[str, Sequence[float]]:
    """Arrival times of every pipeline [s]; the same streams as a live run of this seed without warm-up."""
    return {
        name: process.times(arrivals.stream(seed, name, "arrivals"), horizon_s).tolist() for name, process in workload.items()
    }


def run(
    world: World,
    name: str,
    policy: ScalingPolicy[S],
    workload: Mapping[str, ArrivalProcess],
    *,
    initial: Placement,
    duration_s: float,
    slot_s: float,
    seed: int,
    warmup_s: float = 0.0,
    schedule: Mapping[str, Sequence[float]] | None = None,
    losses: Sequence[Loss] = (),
    link_faults: Sequence[LinkFault] = (),
    silences: Sequence[Silence] = (),
    ingredients: Ingredients = ALL,
    load: float = 1.0,
    options: Mapping[str, Any] | None = None,
    keep_records: bool = False,
) -> Run:
    """Step a policy over a testbed.

    Tasks that have not ended when the time is up are waited for, and add no cost: with shedding the last of them ends by its
    deadline, without it when it is computed.

    Args:
        world: what is simulated.
        name: what the row calls the policy.
        policy: who decides.
        workload: pipeline -> law of its arrivals, scaled already where `load` is not 1 (`loadgen.arrivals.scaled`).
        initial: what runs at the beginning, whoever decides later.
        duration_s: simulated time [s], the warm-up included.
        slot_s: between two decisions [s].
        seed: of arrivals, service times and routing.
        warmup_s: time at the beginning that is not measured [s].
        schedule: pipeline -> arrival times [s], ascending, in place of what the workload would draw: of a recorded run, say.
        losses: nodes that are lost, some to come back.
        link_faults: links that are slower for a while, or gone.
        silences: when no metrics are sampled.
        ingredients: rules of the data plane that are in use.
        load: for the row: the factor by which the caller has scaled the workload. Nothing is multiplied here.
        options: for the row: the policy's options.
        keep_records: keep a record of every task, those of the warm-up included.

    Raises:
        ValueError: a time that is impossible, or a fault of a node or a link that is not there.
    """
    _check(duration_s, slot_s, warmup_s)
    kernel = Kernel()
    testbed = SimulatedTestbed(
        kernel,
        world,
        arrival_times(workload, seed, duration_s) if schedule is None else schedule,
        seed=seed,
        initial=initial,
        sample_every_s=slot_s,
        measured_from_s=warmup_s,
        ingredients=ingredients,
        keep_records=keep_records,
    )
    faults: tuple[Fault, ...] = (*losses, *link_faults, *silences)
    for fault in faults:
        testbed.plan_fault(fault)
    promised = _control(testbed, policy, slot_s, warmup_s, duration_s)
    testbed.account()
    spent, replica_seconds, starts, let_out = testbed.cost, testbed.replica_seconds, testbed.starts, testbed.let_out
    while testbed.in_flight and kernel.step():
        pass
    named = {} if ingredients == ALL else {"ingredients": ingredients.name}
    sent = {pipeline: sum(counts.values()) for pipeline, counts in testbed.measured.items()}
    late = {pipeline: _late(counts) for pipeline, counts in testbed.measured.items()}
    outcomes = {outcome: sum(counts[outcome] for counts in testbed.measured.values()) for outcome in OUTCOMES}
    epsilons = {pipeline: world.pipelines[pipeline].epsilon for pipeline, count in sent.items() if count}
    tasks = sum(sent.values())
    row = Row(
        policy=name,
        options={**(options or {}), **named},
        load=load,
        seed=seed,
        on_time_ratio=outcomes["on_time"] / tasks if tasks else None,
        late_ratio=sum(late.values()) / tasks if tasks else None,
        epsilon=math.fsum(epsilon * sent[name] for name, epsilon in epsilons.items()) / tasks if tasks else None,
        promised=promised,
        outcomes=outcomes,
        cost=spent.total,
        replicas=replica_seconds / (duration_s - warmup_s),
        starts=starts,
        let_out=let_out,
        pipelines={pipeline: dict(counts) for pipeline, counts in testbed.measured.items()},
        late_by_pipeline={pipeline: late[pipeline] / sent[pipeline] for pipeline in epsilons},
        epsilon_by_pipeline=epsilons,
    )
    return Run(row=row, cost=spent, records=tuple(testbed.records or ()), events=kernel.events, visits=testbed.visits)


def _check(duration_s: float, slot_s: float, warmup_s: float) -> None:
    if not 0 < slot_s < math.inf:
        raise ValueError(f"slot_s is {slot_s}; it must be above 0")
    if not 0 <= warmup_s < duration_s < math.inf:
        raise ValueError(f"a warm-up of {warmup_s} s does not leave anything to measure of {duration_s} s")


def _control(
    testbed: SimulatedTestbed, policy: ScalingPolicy[S], slot_s: float, warmup_s: float, until_s: float
) -> dict[str, float] | None:
    """Slots begin at 0, slot_s, 2 slot_s, ... before `until_s`; the clock is left there.

    Returns:
        What the policy's states promised after the warm-up, by pipeline, averaged over the slots in which they did.
    """
    state = policy.initial()
    told: dict[str, list[float]] = {}
    for slot in range(math.ceil(until_s / slot_s)):
        testbed.kernel.run(slot * slot_s)
        state, decision = policy.step(state, testbed.observe())
        if decision.desired is not None:
            testbed.apply(decision.desired)
        promised: Mapping[str, float] | None = getattr(state, "promised", None)
        if promised and slot * slot_s >= warmup_s:
            for pipeline, late in promised.items():
                told.setdefault(pipeline, []).append(late)
    testbed.kernel.run(until_s)
    return {pipeline: math.fsum(values) / len(values) for pipeline, values in told.items()} or None


def _late(counts: Mapping[Outcome, int]) -> int:
    return sum(counts[outcome] for outcome in OUTCOMES if outcome in TOO_LATE)
