from __future__ import annotations

import pytest

from orchestrator.core import Placement, Target
from orchestrator.simulator.run import Loss
from tests.orchestrator.simulator.worlds import chain, simulate, stage, world

WORLD = world([stage("a", 0.02, cv2=0.5, start_s=1.0)], [chain("p", "a")])


def test_the_static_policy_keeps_its_replicas_and_starts_nothing() -> None:
    run = simulate(WORLD, {"p": "poisson:80"}, {"a": Target(3)}, duration_s=20)
    assert run.row.replicas == pytest.approx(3.0)
    assert run.row.starts == 0
    assert run.row.cost == pytest.approx(3 * 20)


def test_ratios_are_of_all_that_was_sent() -> None:
    row = simulate(WORLD, {"p": "poisson:200"}, {"a": Target(2)}, duration_s=10).row
    sent = sum(row.outcomes.values())
    assert row.on_time_ratio == row.outcomes["on_time"] / sent
    assert row.late_ratio == (row.outcomes["late"] + row.outcomes["expired"] + row.outcomes["rejected"]) / sent
    assert 0.3 < row.on_time_ratio < 0.7
    assert row.policy == "static"


def test_what_the_policy_asks_for_is_started_and_paid_for() -> None:
    one = Placement({"a": {"n0": 1}})
    row = simulate(WORLD, {"p": "poisson:20"}, {"a": Target(3)}, duration_s=5, initial=one, slot_s=0.5).row
    assert row.starts == 2
    # Both are ready a second after the first slot.
    assert row.replicas == pytest.approx(1 + 2 * 4 / 5)
    assert row.cost == pytest.approx(5 + 2 * 4 + 2)


def test_the_warm_up_is_neither_counted_nor_paid_for() -> None:
    one = Placement({"a": {"n0": 1}})
    run = simulate(WORLD, {"p": "constant:20"}, {"a": Target(3)}, duration_s=5, warmup_s=2.0, initial=one, keep_records=True)
    assert run.row.starts == 0
    assert (run.row.cost, run.row.replicas) == pytest.approx((9.0, 3.0))
    assert sum(run.row.outcomes.values()) == 60
    assert len(run.records) == 100


def test_tasks_under_way_at_the_end_are_waited_for() -> None:
    row = simulate(world([stage("a", 0.4)], [chain("p", "a")]), {"p": "constant:1"}, {"a": Target(1)}, duration_s=1.1).row
    assert row.outcomes["on_time"] == 2


def test_without_tasks_there_is_no_ratio() -> None:
    row = simulate(WORLD, {}, {"a": Target(1)}, duration_s=1).row
    assert (row.on_time_ratio, row.late_ratio) == (None, None)
    assert row.cost == pytest.approx(1.0)


def test_a_loss_within_the_run_shows_in_the_row() -> None:
    where = world([stage("a", 0.02)], [chain("p", "a")], nodes=2)
    both = Placement({"a": {"n0": 1, "n1": 1}})
    row = simulate(where, {"p": "poisson:20"}, {"a": Target(2)}, duration_s=10, initial=both, losses=[Loss("n1", 5.0)]).row
    assert row.replicas == pytest.approx(1.5)


@pytest.mark.parametrize(("duration_s", "slot_s", "warmup_s"), [(0.0, 1.0, 0.0), (5.0, 0.0, 0.0), (5.0, 1.0, 5.0)])
def test_impossible_times_are_refused(duration_s: float, slot_s: float, warmup_s: float) -> None:
    with pytest.raises(ValueError, match=r"must be above 0|anything to measure"):
        simulate(WORLD, {}, {"a": Target(1)}, duration_s=duration_s, slot_s=slot_s, warmup_s=warmup_s)
