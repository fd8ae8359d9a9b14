from __future__ import annotations

import pytest

from orchestrator.core import Placement, Target
from orchestrator.errors import Infeasible
from orchestrator.placement import explain
from orchestrator.placement.explain import Beside
from orchestrator.placement.program import Limits
from tests.orchestrator.placement.instances import line, service, small

LIGHT = (service("pool", 0.5, 1),)


def test_light_services_and_standbys_go_into_the_room_that_is_left() -> None:
    made = explain.make(line(2, 1.0), Limits(), Beside(LIGHT, {"pool": Target(1), "s0": Target(1, 1)}))
    assert made.placement == Placement({"s0": {"a": 1}, "s1": {"a": 1}, "pool": {"b": 1}}, {"s0": {"c": 1}})
    assert made.solution.placement == Placement({"s0": {"a": 1}, "s1": {"a": 1}})


def test_light_services_without_room_are_infeasible() -> None:
    with pytest.raises(Infeasible, match="no node has room for replica 9 of 9 of pool"):
        explain.make(line(2, 1.0), Limits(), Beside(LIGHT, {"pool": Target(9)}))


def test_the_document_says_why_and_what_is_left() -> None:
    told = explain.document(explain.make(line(2, 0.5, gamma=0.5), Limits(gap=0.0)))
    assert told["cost_per_s"] == pytest.approx(16.0)
    assert told["carried_without"] == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert told["why"]["s0"] == {
        "replicas": 2, "load": pytest.approx(1.0), "utilisation": pytest.approx(0.005),
        "for_the_load_or_asked": 1, "for_diversity": 1, "left_after_a_loss": 1,
    }  # fmt: skip
    assert {"rule": "capacity", "subject": "cpus of a"} in told["binding"]


def test_a_heuristic_that_does_not_keep_the_promise_says_so() -> None:
    made = explain.make(small(38), Limits(time_s=0.0))
    assert made.solution.status == "greedy"
    said = "\n".join(explain.lines(made, explain=True))
    assert "how: greedy heuristic" in said
    assert "no bound is known" in said
    assert ("NOT kept" in said) == (not explain.survives(made))
