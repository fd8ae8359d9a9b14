from __future__ import annotations

from typing import Any

import pytest

from loadgen.outcome import TaskRecord
from models.manifest import ServiceLaw
from orchestrator.core import Placement, Target
from orchestrator.simulator.kernel import Kernel
from orchestrator.simulator.run import Loss
from orchestrator.simulator.testbed import SimulatedTestbed
from orchestrator.simulator.world import Delays, World
from tests.orchestrator.simulator.worlds import chain, fork, meshed, simulate, stage, world

ONE = Placement({"a": {"n0": 1}})


def bed_of(where: World, times: list[float], initial: Placement = ONE) -> SimulatedTestbed:
    name = next(iter(where.pipelines))
    return SimulatedTestbed(Kernel(), where, {name: times}, seed=1, initial=initial, keep_records=True)


def records(bed: SimulatedTestbed) -> list[TaskRecord]:
    return sorted(bed.records or [], key=lambda record: record.index)


def small(**options: Any) -> World:
    return world([stage("a", 0.1, start_s=2.0)], [chain("p", "a", deadline_s=0.35)], **options)


def outcomes(bed: SimulatedTestbed) -> list[str]:
    return [record.outcome for record in records(bed)]


def states(bed: SimulatedTestbed) -> list[str]:
    return [replica.state for replica in bed.replicas()]


# --- tasks ----------------------------------------------------------------------------------------------------------------


def test_tasks_queue_and_those_past_saving_are_dropped_before_any_work() -> None:
    bed = bed_of(small(), [0.0, 0.0, 0.0, 0.0, 0.0])
    bed.kernel.run(2.0)
    # Three fit into 0.35 s at 0.1 s each; the stage drops the others when their turn comes.
    assert outcomes(bed) == ["on_time"] * 3 + ["expired"] * 2
    assert [record.latency_s for record in records(bed)[:3]] == pytest.approx([0.1, 0.2, 0.3])
    assert {record.reason for record in records(bed) if record.outcome == "expired"} == {"would_expire"}


def test_a_batch_is_computed_together_where_it_pays() -> None:
    both = stage("a", 0.1, max_batch=8, law=ServiceLaw(base_s=0.09, per_unit_s=0.01, tail_ratio=1.0))
    bed = bed_of(world([both], [chain("p", "a")]), [0.0, 0.01, 0.02])
    bed.kernel.run(2.0)
    assert [hop.batch for record in records(bed) for hop in record.hops] == [1, 2, 2]
    assert records(bed)[-1].finished_s == pytest.approx(0.1 + 0.09 + 0.02)


def test_a_full_queue_rejects() -> None:
    bed = bed_of(world([stage("a", 0.1, queue_capacity=2)], [chain("p", "a", deadline_s=5.0)]), [0.0] * 4)
    bed.kernel.run(2.0)
    assert outcomes(bed) == ["on_time"] * 3 + ["rejected"]


def test_known_overload_is_refused_at_the_door() -> None:
    bed = bed_of(small(), [0.0] * 6 + [0.11])
    bed.kernel.run(2.0)
    last = next(record for record in records(bed) if record.index == 6)
    assert (last.outcome, last.reason) == ("rejected", "overloaded")


def test_without_a_ready_replica_tasks_are_rejected() -> None:
    bed = bed_of(small(), [0.0], Placement(standby={"a": {"n0": 1}}))
    bed.kernel.run(1.0)
    assert [(record.status, record.reason) for record in records(bed)] == [(503, "no_replica")]


def test_every_link_takes_its_latency_and_the_bytes_their_time() -> None:
    stages = [stage("a", 0.1, inputs={"x": 1e6}, outputs={"x": 2e6}), stage("b", 0.1, outputs={"x": 1e6})]
    where = world(stages, [chain("p", "a", "b", deadline_s=5.0)], nodes=3, links=meshed(3, 0.01, 1e7))
    bed = bed_of(where, [0.0], Placement({"a": {"n1": 1}, "b": {"n2": 1}}))
    bed.kernel.run(2.0)
    # There: 1 MB to n1 and 2 MB to n2; back: 1 MB over both links.
    there, back = (0.01 + 0.1) + (0.01 + 0.2), 2 * (0.01 + 0.1)
    assert records(bed)[0].finished_s == pytest.approx(there + 0.2 + back)


def test_transfers_over_one_link_come_one_after_the_other() -> None:
    where = world(
        [stage("a", 0.1, slots=2, inputs={"x": 1e6})], [chain("p", "a", deadline_s=5.0)], nodes=2, links=meshed(2, 0.0, 1e7)
    )
    bed = bed_of(where, [0.0, 0.0], Placement({"a": {"n1": 1}}))
    bed.kernel.run(2.0)
    assert [record.finished_s for record in records(bed)] == pytest.approx([0.2, 0.3])


def test_branches_run_at_once_and_the_join_waits_for_the_slower() -> None:
    stages = [stage("a", 0.1), stage("b", 0.3), stage("c", 0.05)]
    bed = bed_of(
        world(stages, [fork("p", "a", "b", "c", deadline_s=5.0)]), [0.0], Placement({name: {"n0": 1} for name in "abc"})
    )
    bed.kernel.run(2.0)
    record = records(bed)[0]
    assert record.finished_s == pytest.approx(0.35)
    assert [hop.step for hop in record.hops] == ["left", "right", "join"]


def test_a_slower_node_takes_longer() -> None:
    bed = bed_of(small(speeds={"n0": 0.5}), [0.0])
    bed.kernel.run(1.0)
    assert records(bed)[0].finished_s == pytest.approx(0.2)


# --- replicas -------------------------------------------------------------------------------------------------------------


def test_a_start_takes_its_time_and_a_standby_only_the_routes() -> None:
    bed = bed_of(small(delays=Delays(routes_s=0.05)), [], Placement({"a": {"n0": 1}}, {"a": {"n0": 1}}))
    bed.apply(Placement({"a": {"n0": 3}}))
    assert states(bed) == ["ready", "ready", "starting"]
    assert bed.starts == 1
    bed.kernel.run(1.99)
    assert states(bed) == ["ready", "ready", "starting"]
    bed.kernel.run(2.0)
    assert states(bed) == ["ready", "ready", "ready"]


def test_tasks_go_to_a_let_out_standby_when_the_routes_have_come() -> None:
    where = small(delays=Delays(routes_s=0.05))
    bed = bed_of(where, [0.04, 0.06], Placement(standby={"a": {"n0": 1}}))
    bed.apply(Placement({"a": {"n0": 1}}))
    bed.kernel.run(1.0)
    assert outcomes(bed) == ["rejected", "on_time"]


def test_a_drain_loses_no_task() -> None:
    where = small(delays=Delays(routes_s=0.05))
    bed = bed_of(where, [0.0, 0.01, 0.02, 0.03], Placement({"a": {"n0": 2}}))
    bed.kernel.run(0.035)
    bed.apply(ONE)
    assert sorted(states(bed)) == ["draining", "ready"]
    bed.kernel.run(1.0)
    assert states(bed) == ["ready"]
    assert outcomes(bed) == ["on_time"] * 4


def test_cost_is_that_of_every_state_for_as_long_as_it_lasts() -> None:
    bed = bed_of(small(), [], Placement({"a": {"n0": 1}}, {"a": {"n0": 1}}))
    bed.kernel.run(1.0)
    bed.apply(Placement({"a": {"n0": 3}}))
    bed.kernel.run(4.0)
    bed.account()
    # One core at work all the time, one more from 1 s on, a third from 3 s on; a standby for the first second; one start.
    assert (bed.cost.replicas, bed.cost.standby, bed.cost.starts) == pytest.approx((4 + 3 + 1, 0.1, 1.0))
    assert bed.replica_seconds == pytest.approx(8.0)


# --- node loss ------------------------------------------------------------------------------------------------------------


def test_a_lost_node_loses_only_what_it_held() -> None:
    where = world([stage("a", 0.05)], [chain("p", "a")], nodes=2)
    run = simulate(
        where, {"p": "constant:20"}, {"a": Target(2)}, duration_s=20, losses=[Loss("n1", 10.01)], keep_records=True,
        initial=Placement({"a": {"n0": 1, "n1": 1}}),
    )  # fmt: skip
    missed = [record for record in run.records if record.outcome != "on_time"]
    # What it held is sent to the other replica, in time; nothing else is touched.
    assert missed == []
    assert any(hop.node == "n1" for record in run.records for hop in record.hops)
    assert {hop.node for record in run.records if record.scheduled_s > 10.01 for hop in record.hops} == {"n0"}


def test_what_only_the_lost_node_could_do_fails_and_the_rest_does_not() -> None:
    where = world([stage("a", 0.1), stage("b", 0.01)], [chain("p", "a", "b"), chain("q", "b")], nodes=2)
    run = simulate(
        where, {"p": "constant:20", "q": "constant:20"}, {"a": Target(3), "b": Target(1)}, duration_s=4,
        losses=[Loss("n1", 2.01)], initial=Placement({"a": {"n1": 3}, "b": {"n0": 1}}), keep_records=True,
    )  # fmt: skip
    assert {record.outcome for record in run.records if record.pipeline == "q"} == {"on_time"}
    ends = {(record.outcome, record.reason) for record in run.records if record.pipeline == "p" and record.scheduled_s > 2.04}
    assert ends == {("rejected", "no_replica")}
    held = [record for record in run.records if record.outcome == "failed"]
    assert 0 < len(held) <= 3
    # Computing on it or queued there, or further on with the call still held open by it.
    assert all(1.89 < record.scheduled_s <= 2.04 for record in held)


def test_nothing_starts_on_a_lost_node() -> None:
    bed = bed_of(small(nodes=2), [], Placement({"a": {"n0": 1, "n1": 1}}))
    bed.apply(Placement({"a": {"n0": 1, "n1": 1}}))
    bed.lose_node("n1", 1.0)
    bed.kernel.run(10.0)
    assert [(replica.node, replica.state) for replica in bed.replicas()] == [("n0", "ready")]
    with pytest.raises(ValueError, match="no node 'n9'"):
        bed.lose_node("n9", 11.0)


# --- telemetry ------------------------------------------------------------------------------------------------------------


def test_an_observation_tells_rates_waits_and_outcomes_of_the_interval() -> None:
    bed = bed_of(small(), [1.1, 1.1, 1.5])
    bed.kernel.run(1.0)
    bed.observe()
    bed.kernel.run(2.0)
    seen = bed.observe()
    signal = seen.services["a"].signal
    assert signal is not None
    assert (signal.arrival_rate, signal.wait_s, signal.service_s) == pytest.approx((3.0, 0.1 / 3, 0.1))
    assert (signal.queue_length, signal.inflight, signal.age_s) == (0, 0, 0)
    assert seen.pipelines["p"].outcomes["on_time"] == 3
    assert seen.services["a"].replicas == {"n0": {"ready": 1}}


def test_metric_lag_is_the_age_of_what_is_seen() -> None:
    bed = bed_of(small(delays=Delays(metric_lag_s=0.3)), [1.65, 1.75])
    for t in (1.0, 2.0):
        bed.kernel.run(t)
        seen = bed.observe()
    signal = seen.services["a"].signal
    assert signal is not None
    assert signal.age_s == pytest.approx(0.3)
    # Sampled at 1.7 s: the first task was there, the second was not.
    assert signal.inflight == 1


def test_arrivals_for_no_pipeline_are_refused() -> None:
    with pytest.raises(ValueError, match="no pipeline 'x'"):
        SimulatedTestbed(Kernel(), small(), {"x": [0.0]}, seed=1, initial=ONE)
