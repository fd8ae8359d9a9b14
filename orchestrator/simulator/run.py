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
from orchestrator.simulator.kernel import Kernel
from orchestrator.simulator.testbed import SimulatedTestbed
from orchestrator.simulator.world import World

S = TypeVar("S")

TOO_LATE: frozenset[Outcome] = frozenset({"late", "expired", "rejected"})
"""Outcomes that a pipeline's epsilon is held against: answered too late, or dropped so as not to be."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A node is lost at `time` [s]."""

    node: str
    time: float


@dataclass(frozen=True, slots=True)
class Row:
    """What came of a run. Tasks are those scheduled after the warm-up; cost and replicas are of the time after it."""

    policy: str
    seed: int
    on_time_ratio: float | None
    """on_time / all tasks sent; None where none was."""
    late_ratio: float | None
    """late, expired and rejected / all tasks sent."""
    outcomes: Mapping[Outcome, int]
    cost: float
    replicas: float
    """Ready replicas of all services, averaged over time."""
    starts: int
    pipelines: Mapping[str, Mapping[Outcome, int]]
    """Outcomes by pipeline."""

    def as_dict(self) -> dict[str, Any]:
        """The row as one JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Run:
    """A row, and what it was made of."""

    row: Row
    cost: Cost
    records: tuple[TaskRecord, ...]
    """Empty unless they were asked for."""
    events: int
    """Events of the kernel."""


def schedule(workload: Mapping[str, ArrivalProcess], seed: int, horizon_s: float) -> dict[str, Sequence[float]]:
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
    losses: Sequence[Loss] = (),
    keep_records: bool = False,
) -> Run:
    """Step a policy over a testbed.

    Tasks that have not ended when the time is up are waited for: the last of them ends by its deadline, and adds no cost.

    Args:
        world: what is simulated.
        name: what the row calls the policy.
        policy: who decides.
        workload: pipeline -> law of its arrivals.
        initial: what runs at the beginning, whoever decides later.
        duration_s: simulated time [s], the warm-up included.
        slot_s: between two decisions [s].
        seed: of arrivals, service times and routing.
        warmup_s: time at the beginning that is not measured [s].
        losses: nodes that are lost.
        keep_records: keep a record of every task, those of the warm-up included.

    Raises:
        ValueError: a time that is impossible, or a loss of a node that is not there.
    """
    _check(duration_s, slot_s, warmup_s)
    kernel = Kernel()
    testbed = SimulatedTestbed(
        kernel,
        world,
        schedule(workload, seed, duration_s),
        seed=seed,
        initial=initial,
        sample_every_s=slot_s,
        measured_from_s=warmup_s,
        keep_records=keep_records,
    )
    for loss in losses:
        testbed.lose_node(loss.node, loss.time)
    _control(testbed, policy, slot_s, duration_s)
    testbed.account()
    spent, replica_seconds, starts = testbed.cost, testbed.replica_seconds, testbed.starts
    while testbed.in_flight and kernel.step():
        pass
    return Run(
        row=_row(name, seed, testbed.measured, spent, replica_seconds / (duration_s - warmup_s), starts),
        cost=spent,
        records=tuple(testbed.records or ()),
        events=kernel.events,
    )


def _check(duration_s: float, slot_s: float, warmup_s: float) -> None:
    if not 0 < slot_s < math.inf:
        raise ValueError(f"slot_s is {slot_s}; it must be above 0")
    if not 0 <= warmup_s < duration_s < math.inf:
        raise ValueError(f"a warm-up of {warmup_s} s does not leave anything to measure of {duration_s} s")


def _control(testbed: SimulatedTestbed, policy: ScalingPolicy[S], slot_s: float, until_s: float) -> None:
    """Slots begin at 0, slot_s, 2 slot_s, ... before `until_s`; the clock is left there."""
    state = policy.initial()
    for slot in range(math.ceil(until_s / slot_s)):
        testbed.kernel.run(slot * slot_s)
        state, decision = policy.step(state, testbed.observe())
        if decision.desired is not None:
            testbed.apply(decision.desired)
    testbed.kernel.run(until_s)


def _row(name: str, seed: int, measured: Mapping[str, Mapping[Outcome, int]], spent: Cost, replicas: float, starts: int) -> Row:
    outcomes = {outcome: sum(counts[outcome] for counts in measured.values()) for outcome in OUTCOMES}
    sent = sum(outcomes.values())
    return Row(
        policy=name,
        seed=seed,
        on_time_ratio=outcomes["on_time"] / sent if sent else None,
        late_ratio=sum(outcomes[outcome] for outcome in OUTCOMES if outcome in TOO_LATE) / sent if sent else None,
        outcomes=outcomes,
        cost=spent.total,
        replicas=replicas,
        starts=starts,
        pipelines={pipeline: dict(counts) for pipeline, counts in measured.items()},
    )
