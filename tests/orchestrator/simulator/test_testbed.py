from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from loadgen.outcome import TaskRecord
from models.manifest import ServiceLaw
from orchestrator.core import Placement, Target
from orchestrator.simulator.faults import LinkFault, Loss, Silence
from orchestrator.simulator.ingredients import ALL, Ingredients
from orchestrator.simulator.kernel import Kernel
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
    bed.plan_fault(Loss("n1", 1.0))
    bed.kernel.run(10.0)
    assert [(replica.node, replica.state) for replica in bed.replicas()] == [("n0", "ready")]
    with pytest.raises(ValueError, match="no node 'n9'"):
        bed.plan_fault(Loss("n9", 11.0))


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


# --- letting out ----------------------------------------------------------------------------------------------------------


def let_out_bed(times: list[float], *, allowance: int = 1, **options: Any) -> SimulatedTestbed:
    """One replica at work and two standbys; the gateway has learnt of the first when the task at 0 s is answered."""
    ingredients = options.pop("ingredients", ALL)
    where = world([stage("a", 0.1, start_s=2.0)], [chain("p", "a", deadline_s=0.5)], **options)
    bed = SimulatedTestbed(
        Kernel(), where, {"p": [0.0, *times]}, seed=1, initial=WITH_STANDBYS, ingredients=ingredients, keep_records=True
    )
    bed.apply(replace(WITH_STANDBYS, allowance={"a": allowance}))
    return bed


WITH_STANDBYS = Placement({"a": {"n0": 1}}, {"a": {"n0": 2}})


def test_a_standby_is_let_out_at_once_for_a_task_that_would_wait_too_long() -> None:
    bed = let_out_bed([1.0, 1.0, 1.0, 1.0])
    bed.kernel.run(1.0)
    # Of the 0.4 s of slack a quarter may be spent on waiting: the third would wait 0.2 s.
    assert states(bed) == ["ready", "ready", "standby"]
    assert [view.let_out for view in bed.replicas()] == [False, True, False]
    assert bed.let_out == 1
    assert bed.observe().services["a"].let_out == {"n0": 1}
    bed.kernel.run(2.0)
    assert outcomes(bed) == ["on_time"] * 5
    assert len({hop.replica for record in records(bed) for hop in record.hops}) == 2


def test_where_it_is_patient_a_standby_is_let_out_only_for_a_wait_beyond_the_slack() -> None:
    for tasks, let_out in ((4, 0), (5, 1)):
        bed = let_out_bed([1.0] * tasks)
        bed.apply(replace(WITH_STANDBYS, allowance={"a": 1}, patience={"a": 1.0}))
        bed.kernel.run(1.0)
        assert bed.let_out == let_out, "the fourth waits 0.3 s of its slack of 0.4 s, the fifth would be late"


def test_the_allowance_is_spent_once_a_decision() -> None:
    burst = [1.0] * 12
    bed = let_out_bed(burst, allowance=1)
    bed.kernel.run(1.4)
    assert states(bed) == ["ready", "ready", "standby"]
    assert let_out_bed(burst, allowance=0).let_out == 0


def test_the_next_decision_confirms_what_was_let_out_or_takes_it_back() -> None:
    for desired, after in (
        (Placement({"a": {"n0": 2}}, {"a": {"n0": 1}}), ["ready", "ready", "standby"]),
        (WITH_STANDBYS, ["ready", "standby", "standby"]),
    ):
        bed = let_out_bed([1.0] * 4)
        bed.kernel.run(1.0)
        bed.apply(desired)
        assert bed.observe().services["a"].let_out == {}
        bed.kernel.run(2.0)
        assert sorted(states(bed)) == after
        assert outcomes(bed) == ["on_time"] * 5


def test_what_was_let_out_stays_when_another_replica_changes_meanwhile() -> None:
    bed = let_out_bed([1.0] * 4)
    bed.kernel.run(0.5)
    bed.apply(Placement({"a": {"n0": 1}}, {"a": {"n0": 3}}, {"a": 1}))
    bed.kernel.run(2.5)
    # The third standby has been loaded at 2.5 s; that made a plan, and the plan kept what was let out at work.
    assert sorted(states(bed)) == ["ready", "ready", "standby", "standby"]


def test_nobody_is_let_out_where_no_core_is_free_or_the_rule_is_not_in_use() -> None:
    for bed in (let_out_bed([1.0] * 4, cpus=1.5), let_out_bed([1.0] * 4, ingredients=Ingredients(let_out=False))):
        bed.kernel.run(1.4)
        assert (bed.let_out, states(bed)) == (0, ["ready", "standby", "standby"])


def test_with_nobody_at_work_a_standby_is_let_out_for_the_first_task() -> None:
    only = Placement({}, {"a": {"n0": 1}}, {"a": 1})
    bed = bed_of(small(), [0.0, 1.0], only)
    bed.apply(only)
    bed.kernel.run(2.0)
    assert outcomes(bed) == ["on_time", "on_time"]


def test_a_let_out_replica_is_paid_for_as_one_at_work() -> None:
    bed = let_out_bed([1.0] * 4)
    bed.kernel.run(3.0)
    bed.account()
    assert (bed.cost.replicas, bed.cost.standby) == pytest.approx((1 * 1 + 2 * 2, 0.1 * (2 * 1 + 1 * 2)))


# --- without some of the rules --------------------------------------------------------------------------------------------


def without(times: list[float], where: World | None = None, **off: bool) -> SimulatedTestbed:
    where = small() if where is None else where
    return SimulatedTestbed(
        Kernel(), where, dict.fromkeys(where.pipelines, times), seed=1, initial=ONE, ingredients=Ingredients(**off),
        keep_records=True,
    )  # fmt: skip


def test_without_shedding_every_task_is_computed_and_answered_late() -> None:
    bed = without([0.0] * 5 + [0.11], shedding=False)
    bed.kernel.run(2.0)
    assert outcomes(bed) == ["on_time"] * 3 + ["late"] * 3
    assert [record.latency_s for record in records(bed)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.49])


def test_without_shedding_late_tasks_still_share_batches() -> None:
    pays = stage("a", 0.1, max_batch=8, law=ServiceLaw(base_s=0.09, per_unit_s=0.01, tail_ratio=1.0))
    bed = without([0.0] * 6, world([pays], [chain("p", "a", deadline_s=0.12)]), shedding=False)
    bed.kernel.run(2.0)
    assert [hop.batch for record in records(bed) for hop in record.hops] == [1] + [5] * 5


def test_without_earliest_deadline_first_tasks_are_computed_as_they_come() -> None:
    where = world([stage("a", 0.1)], [chain("slow", "a", deadline_s=5.0), chain("urgent", "a", deadline_s=1.0)])
    first = {}
    for name, edf in (("edf", True), ("fifo", False)):
        bed = SimulatedTestbed(
            Kernel(), where, {"slow": [0.0, 0.01, 0.02], "urgent": [0.03]}, seed=1, initial=ONE,
            ingredients=Ingredients(earliest_deadline_first=edf), keep_records=True,
        )  # fmt: skip
        bed.kernel.run(2.0)
        first[name] = next(record.latency_s for record in records(bed) if record.pipeline == "urgent")
    assert first == {"edf": pytest.approx(0.17), "fifo": pytest.approx(0.37)}


def test_without_standbys_none_is_placed_and_what_is_started_goes_to_work() -> None:
    where = small()
    bed = SimulatedTestbed(Kernel(), where, {}, seed=1, initial=WITH_STANDBYS, ingredients=Ingredients(standby=False))
    assert states(bed) == ["ready"]
    bed.apply(Placement({"a": {"n0": 2}}, {"a": {"n0": 2}}, {"a": 2}))
    assert states(bed) == ["ready", "starting"]
    bed.kernel.run(5.0)
    assert states(bed) == ["ready", "ready"]


# --- other faults ---------------------------------------------------------------------------------------------------------


def linked(times: list[float], fault: LinkFault, replicas: Placement, deadline_s: float = 5.0) -> SimulatedTestbed:
    where = world(
        [stage("a", 0.1, inputs={"x": 1e6})], [chain("p", "a", deadline_s=deadline_s)], nodes=3, links=meshed(3, 0.01, 1e7)
    )
    bed = bed_of(where, times, replicas)
    bed.plan_fault(fault)
    bed.kernel.run(20.0)
    return bed


def test_a_link_fault_slows_what_passes_while_it_lasts() -> None:
    fault = LinkFault("n1", "n0", 1.0, 2.0, latency_factor=5.0, bandwidth_factor=0.5)
    bed = linked([0.0, 1.2, 3.0], fault, Placement({"a": {"n1": 1}}))
    # 1 MB there, nothing back: 10 ms + 100 ms and 10 ms; then 50 ms + 200 ms and 50 ms.
    assert [record.latency_s for record in records(bed)] == pytest.approx([0.22, 0.4, 0.22])


def test_calls_over_a_cut_link_break_off_and_are_made_elsewhere() -> None:
    fault = LinkFault("n0", "n1", 0.15, 3.0, cut=True)
    bed = linked([0.0, 0.0, 1.0, 4.0], fault, Placement({"a": {"n1": 1, "n2": 1}}))
    assert outcomes(bed) == ["on_time"] * 4
    used = [record.hops[-1].node for record in records(bed)]
    assert used[:3] == ["n2", "n2", "n2"]
    # The replica went on living, and nothing is left there of the call that broke off.
    assert states(bed) == ["ready", "ready"]


def test_nobody_is_reached_over_a_cut_link_until_it_is_back() -> None:
    bed = linked([0.0, 0.5, 4.0], LinkFault("n0", "n1", 0.15, 3.0, cut=True), Placement({"a": {"n1": 1}}))
    assert outcomes(bed) == ["failed", "failed", "on_time"]


def test_a_link_fault_needs_a_link() -> None:
    with pytest.raises(ValueError, match="no link between 'n0' and 'n1'"):
        bed_of(small(nodes=2), []).plan_fault(LinkFault("n0", "n1", 1.0))


def test_a_lost_node_may_come_back_and_is_used_again() -> None:
    both = Placement({"a": {"n0": 1, "n1": 1}})
    bed = bed_of(small(nodes=2), [], both)
    bed.apply(both)
    bed.plan_fault(Loss("n1", 1.0, back=4.0))
    bed.kernel.run(5.9)
    assert [(replica.node, replica.state) for replica in bed.replicas()] == [("n0", "ready"), ("n1", "starting")]
    bed.kernel.run(6.0)
    assert [(replica.node, replica.state) for replica in bed.replicas()] == [("n0", "ready"), ("n1", "ready")]


def test_in_a_silence_what_is_known_ages() -> None:
    bed = bed_of(small(), [])
    bed.plan_fault(Silence(1.5, 3.5))
    ages = []
    for t in (1.0, 2.0, 3.0, 4.0):
        bed.kernel.run(t)
        signal = bed.observe().services["a"].signal
        ages.append(None if signal is None else signal.age_s)
    assert ages == pytest.approx([0.0, 1.0, 2.0, 0.0])


def test_an_observation_tells_how_service_times_vary_and_batches_fill() -> None:
    pays = stage("a", 0.1, max_batch=8, law=ServiceLaw(base_s=0.09, per_unit_s=0.01, tail_ratio=1.0))
    bed = bed_of(world([pays], [chain("p", "a")]), [1.1, 1.11, 1.12, 1.13])
    bed.kernel.run(1.0)
    bed.observe()
    bed.kernel.run(2.0)
    signal = bed.observe().services["a"].signal
    assert signal is not None
    # One alone in 0.1 s, three together in 0.12 s.
    mean_s = (0.1 + 3 * 0.12) / 4
    assert signal.service_s == pytest.approx(mean_s)
    assert signal.service_cv2 == pytest.approx((0.1**2 + 3 * 0.12**2) / 4 / mean_s**2 - 1)
    assert signal.batch_size == 2.0
