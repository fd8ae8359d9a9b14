from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from loadgen import arrivals
from orchestrator.core import Decision, Observation, Placement, Target
from orchestrator.simulator import run as simulations
from orchestrator.simulator.faults import Loss
from orchestrator.simulator.ingredients import Ingredients
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


def test_a_row_says_what_it_is_of() -> None:
    row = simulate(
        WORLD,
        {"p": "poisson:80"},
        {"a": Target(3)},
        duration_s=2,
        load=1.5,
        options={"v": 4.0},
        ingredients=Ingredients(let_out=False),
    ).row
    assert (row.load, row.options) == (1.5, {"v": 4.0, "ingredients": "shedding+earliest_deadline_first+standby"})
    assert simulate(WORLD, {}, {"a": Target(1)}, duration_s=1).row.options == {}
    document = json.loads(json.dumps(row.as_dict()))
    assert {"policy", "options", "load", "seed", "on_time_ratio", "late_ratio", "epsilon", "cost", "replicas", "starts"} <= set(
        document
    )


def test_epsilon_is_that_of_the_tasks_that_were_sent() -> None:
    tight, loose = (chain(name, "a").model_copy(update={"epsilon": epsilon}) for name, epsilon in (("t", 0.01), ("l", 0.2)))
    row = simulate(
        world([stage("a", 0.01)], [tight, loose]), {"t": "constant:30", "l": "constant:10"}, {"a": Target(1)}, duration_s=2
    ).row
    assert row.epsilon == pytest.approx((60 * 0.01 + 20 * 0.2) / 80)
    assert row.epsilon_by_pipeline == {"t": 0.01, "l": 0.2}
    assert row.late_by_pipeline == {"t": 0.0, "l": 0.0}


def test_late_ratios_of_pipelines_are_their_own() -> None:
    both = [chain("in-time", "a"), chain("too-late", "a", deadline_s=0.001)]
    row = simulate(
        world([stage("a", 0.01)], both), {"in-time": "constant:10", "too-late": "constant:10"}, {"a": Target(1)}, duration_s=2
    ).row
    assert row.late_by_pipeline == {"in-time": 0.0, "too-late": 1.0}
    assert row.late_ratio == 0.5


@dataclass(frozen=True)
class Reckoned:
    promised: Mapping[str, float] | None


@dataclass(frozen=True)
class Promising:
    """Changes nothing, and reckons with another tail in every slot."""

    state_type = Reckoned

    def initial(self) -> Reckoned:
        return Reckoned(None)

    def step(self, state: Reckoned, observation: Observation) -> tuple[Reckoned, Decision]:
        return Reckoned({"p": observation.t / 10} if observation.t >= 1 else None), Decision(None, "promising")


def test_what_the_policy_promised_is_averaged_over_the_measured_slots() -> None:
    one = Placement({"a": {"n0": 1}})
    done = simulations.run(WORLD, "promising", Promising(), {}, initial=one, duration_s=5, slot_s=1.0, seed=1, warmup_s=2.0)
    assert done.row.promised is not None
    assert done.row.promised["p"] == pytest.approx(0.3)
    assert simulate(WORLD, {}, {"a": Target(1)}, duration_s=1).row.promised is None


def test_a_recorded_schedule_takes_the_place_of_the_laws() -> None:
    run = simulate(WORLD, {"p": "poisson:500"}, {"a": Target(1)}, duration_s=2, schedule={"p": [0.5, 1.25]}, keep_records=True)
    assert [record.scheduled_s for record in sorted(run.records, key=lambda record: record.index)] == [0.5, 1.25]
    assert run.visits == 2


def test_the_same_schedule_drawn_or_given_is_the_same_run() -> None:
    drawn = simulations.arrival_times({"p": arrivals.parse("poisson:80")}, 1, 5.0)
    there, here = (simulate(WORLD, {"p": "poisson:80"}, {"a": Target(2)}, duration_s=5, schedule=s) for s in (drawn, None))
    assert there == here
