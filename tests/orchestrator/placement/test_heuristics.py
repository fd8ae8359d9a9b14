from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core import Placement, Target
from orchestrator.errors import Infeasible
from orchestrator.placement import flows, heuristics
from orchestrator.placement.program import Limits, Program, at_the_limit, judged
from tests.orchestrator.placement.instances import line, small


def test_spread_puts_replicas_of_a_service_on_different_nodes() -> None:
    found = heuristics.spread(line(4, 1.0), wanted={"s0": Target(3), "s1": Target(2)})
    assert found.ready["s0"] == {"a": 1, "b": 1, "c": 1}
    assert max(found.ready["s1"].values()) == 1


def test_near_keeps_what_runs() -> None:
    running = Placement({"s0": {"c": 1}, "s1": {"c": 1}})
    assert heuristics.near(line(2, 1.0), running) == running


def test_what_does_not_fit_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="no node has room for replica 2 of 4 of s1"):
        heuristics.spread(line(1, 1.0), wanted={"s0": Target(2), "s1": Target(4)})


def test_at_the_time_limit_the_cheapest_that_keeps_every_rule_is_taken() -> None:
    problem = line(2, 1.0, gamma=0.5)
    best = Program(problem, Limits(gap=0.0)).solve()
    assert at_the_limit(problem, best, 1.0, None).status == "optimal"
    dear = judged(problem, Placement({s: {"a": 1, "b": 1, "c": 1} for s in ("s0", "s1")}), "incumbent", None)
    found = at_the_limit(problem, dear, 1.0, None)
    assert found.status in ("greedy", "spread")
    assert found.cost < dear.cost
    assert at_the_limit(problem, None, 1.0, None).placement == found.placement


def test_a_cheaper_heuristic_that_breaks_a_rule_is_not_taken() -> None:
    # Greedy puts s1 where a loss leaves it out of reach of the deadline.
    problem = small(38)
    kept = Program(problem, Limits(gap=0.0)).solve()
    found = at_the_limit(problem, kept, 1.0, None)
    assert flows.keeps(problem, problem.arrays.counts(found.placement), found.carried)


@pytest.mark.parametrize("seed", range(30))
def test_the_programs_answer_keeps_every_rule_and_costs_no_less_than_its_replicas_must(seed: int) -> None:
    problem = small(seed)
    try:
        found = Program(problem, Limits(gap=0.0)).solve()
    except Infeasible:
        return
    x = problem.arrays.counts(found.placement)
    assert flows.keeps(problem, x, found.carried)
    assert flows.least_rent(problem) <= found.cost + 1e-9
    assert not flows.keeps(problem, 0 * x, found.carried)


def test_rules_are_told_apart() -> None:
    problem = line(2, 1.0)
    one_each = problem.arrays.counts(Placement({"s0": {"a": 1}, "s1": {"a": 1}}))
    assert flows.keeps(problem, one_each, {})
    assert not flows.keeps(problem, one_each, {"a": -1.0})
    for asked in ({"kappa": 2}, {"budget": 4.0}, {"most_nodes_in_all": 1, "kappa": 2}):
        stricter = replace(problem, parameters=replace(problem.parameters, **asked))
        assert not flows.keeps(stricter, one_each, {})
    assert not flows.keeps(replace(problem, reserve=(5.0, 0.0, 0.0)), one_each, {})
