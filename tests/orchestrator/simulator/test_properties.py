"""What holds of any world under any decisions, whatever goes wrong and whichever rules are in use: no task is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import ServiceLaw
from orchestrator.core import Placement, Replica, Target
from orchestrator.simulator.faults import Fault, LinkFault, Loss, Silence
from orchestrator.simulator.ingredients import Ingredients
from orchestrator.simulator.kernel import Kernel
from orchestrator.simulator.testbed import SimulatedTestbed
from orchestrator.simulator.world import Delays, World
from tests.orchestrator.simulator.worlds import chain, fork, meshed, stage, static, world

NODES = ("n0", "n1", "n2")
END_S = 4.0

times = st.lists(st.floats(0, END_S - 0.5), max_size=40).map(sorted)
instants = st.floats(0.1, END_S)
factors = st.floats(0.1, 10)
pairs = st.sampled_from([("n0", "n1"), ("n1", "n2"), ("n0", "n2")])
faults: st.SearchStrategy[Fault] = st.one_of(
    st.builds(Loss, st.sampled_from(NODES), instants),
    st.builds(lambda node, at, gone: Loss(node, at, at + gone), st.sampled_from(NODES), instants, st.floats(0.1, 2)),
    st.builds(
        lambda ab, at, lasts, x, y: LinkFault(ab[0], ab[1], at, at + lasts, x, y), pairs, instants, instants, factors, factors
    ),
    st.builds(lambda ab, at, lasts: LinkFault(ab[0], ab[1], at, at + lasts, cut=True), pairs, instants, instants),
    st.builds(lambda ab, at: LinkFault(ab[0], ab[1], at, cut=True), pairs, instants),
    st.builds(lambda at, lasts: Silence(at, at + lasts), instants, instants),
)
counts = st.integers(0, 2)
placements = st.builds(
    lambda ready, standby, allowance: Placement(
        {name: dict(zip(NODES, row, strict=True)) for name, row in zip("abc", ready, strict=True)},
        {name: dict(zip(NODES, row, strict=True)) for name, row in zip("abc", standby, strict=True)},
        dict(zip("abc", allowance, strict=True)),
    ),
    *[st.tuples(*[st.tuples(counts, counts, counts)] * 3)] * 2,
    st.tuples(counts, counts, counts),
)


@dataclass(frozen=True)
class Case:
    """A world, what is sent to it, what goes wrong, and a decision for every half second."""

    deadlines_s: tuple[float, float]
    capacity: int
    slots: int
    arrivals: tuple[list[float], list[float]]
    ingredients: Ingredients
    faults: list[Fault]
    decisions: list[Placement]


cases = st.builds(
    Case,
    st.tuples(st.floats(0.02, 0.6), st.floats(0.02, 0.6)),
    st.integers(1, 6),
    st.integers(1, 2),
    st.tuples(times, times),
    st.builds(Ingredients, *[st.booleans()] * 4),
    st.lists(faults, max_size=3),
    st.lists(placements, min_size=1, max_size=8),
)


def world_of(case: Case) -> World:
    law = ServiceLaw(base_s=0.03, per_unit_s=0.01, tail_ratio=1.5)
    stages = [
        stage(
            name, 0.04, 0.5, law=law, max_batch=3, start_s=0.7, drain_grace_s=0.3, queue_capacity=case.capacity,
            slots=case.slots, inputs={"x": 1e4, "y": 1e4}, outputs={"x": 1e4},
        )
        for name in "abc"
    ]  # fmt: skip
    first, second = case.deadlines_s
    return world(
        stages, [chain("line", "a", "b", "c", deadline_s=first), fork("fork", "a", "b", "c", deadline_s=second)],
        nodes=3, cpus=5.0, links=meshed(3, 0.003, 5e6), delays=Delays(hop_s=0.001),
    )  # fmt: skip


def run_of(case: Case) -> SimulatedTestbed:
    where = world_of(case)
    few = static(where, {}).place(dict.fromkeys("abc", Target(2)), None)
    bed = SimulatedTestbed(
        Kernel(), where, dict(zip(("line", "fork"), case.arrivals, strict=True)), seed=1, initial=few, sample_every_s=0.5,
        ingredients=case.ingredients, keep_records=True,
    )  # fmt: skip
    for fault in case.faults:
        bed.plan_fault(fault)
    for slot, desired in enumerate(case.decisions):
        bed.kernel.run(slot * 0.5)
        bed.observe()
        bed.apply(desired)
    bed.kernel.run(END_S)
    # Without shedding a task may wait for everything before it; this bounds how long that can be.
    for _ in range(200_000):
        if not (bed.in_flight and bed.kernel.step()):
            break
    return bed


def sent(case: Case) -> dict[str, int]:
    return {name: len(times) for name, times in zip(("line", "fork"), case.arrivals, strict=True)}


@settings(max_examples=60, deadline=None)
@given(cases)
def test_every_task_has_one_outcome_and_leaves_nothing_behind(case: Case) -> None:
    bed = run_of(case)
    assert bed.in_flight == 0
    assert {name: sum(counts.values()) for name, counts in bed.outcomes.items()} == sent(case)
    ends = Counter((record.pipeline, record.index) for record in bed.records or ())
    assert set(ends.values()) <= {1}
    assert sum(ends.values()) == sum(sent(case).values())
    for replica in bed._replicas.values():
        assert not replica.open
        assert not len(replica.queue)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_what_is_not_in_use_does_nothing(case: Case) -> None:
    bed, used = run_of(case), case.ingredients
    outcomes = Counter(record.outcome for record in bed.records or ())
    if used.shedding:
        assert not outcomes["late"]
    else:
        assert not outcomes["expired"]
        assert "overloaded" not in {record.reason for record in bed.records or ()}
    if not (used.standby and used.let_out):
        assert bed.let_out == 0


@settings(max_examples=30, deadline=None)
@given(cases)
def test_nobody_is_let_out_beyond_the_allowance_or_the_cores(case: Case) -> None:
    where = world_of(case)
    few = static(where, {}).place(dict.fromkeys("abc", Target(2)), None)
    bed = SimulatedTestbed(Kernel(), where, dict(zip(("line", "fork"), case.arrivals, strict=True)), seed=1, initial=few)
    for slot, desired in enumerate(case.decisions):
        bed.kernel.run(slot * 0.5)
        bed.apply(desired)
        before = bed.let_out
        bed.kernel.run(slot * 0.5 + 0.49)
        assert bed.let_out - before <= sum(desired.allowance.values())
        let_out = [view for view in bed.replicas() if view.let_out]
        assert all(_at_work(bed.replicas(), view.node) <= 5.0 + 1e-9 for view in let_out)


def _at_work(replicas: Sequence[Replica], node: str) -> float:
    return sum(replica.cpus for replica in replicas if replica.node == node and replica.state in ("ready", "draining"))
