from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from orchestrator.core import Placement
from orchestrator.errors import Infeasible
from orchestrator.placement import flows
from orchestrator.placement.problem import Problem, Strain
from orchestrator.placement.program import Limits, Program
from orchestrator.placement.trials import NOTHING_LOST, ROUNDS, Trial, withstand
from tests.orchestrator.placement.instances import line

EXACT = Limits(gap=0.0)


def loaded(rate: float = 150.0, cores: float = 4.0, budget: float | None = None, gamma: float = 0.5) -> Problem:
    """`line` with a load that needs two replicas of each service, and half of it one."""
    problem = line(cores, 0.0, gamma)
    demand = replace(problem.demands[0], rate=rate)
    return replace(problem, demands=(demand,), parameters=replace(problem.parameters, budget=budget))


def share_left(problem: Problem, slack: float) -> Trial:
    """A trial by capacity: what `slack` of the surviving throughput carries of the load."""

    def trial(placement: Placement) -> Mapping[str, float]:
        x = problem.arrays.counts(placement)

        def left(lost: int | None) -> float:
            keep = [n for n in range(len(problem.nodes)) if n != lost]
            return float(min((slack * problem.arrays.throughput * x[:, keep].sum(axis=1) / problem.demands[0].rate).min(), 1.0))

        return {NOTHING_LOST: left(None), **{node.name: left(n) for n, node in enumerate(problem.nodes)}}

    return trial


def test_a_placement_that_withstands_its_trial_is_taken_at_once() -> None:
    problem = loaded()
    found = withstand(problem, EXACT, lambda placement: {NOTHING_LOST: 1.0, "a": 1.0, "b": 1.0, "c": 1.0})
    assert found.level == 1.0
    assert found.best.solution.cost == pytest.approx(Program(problem, EXACT).solve().cost)
    assert [tried.name for tried in found.tried if tried.name.startswith("program")] == ["program"]


def test_a_loss_that_leaves_too_little_is_asked_for_more() -> None:
    # Where replicas do 70 % of what the program thinks, half of the load needs two of them after any loss.
    problem = loaded()
    trial = share_left(problem, 0.7)
    found = withstand(problem, EXACT, trial)
    assert found.best.name.startswith("program ")
    assert found.best.worst >= found.level
    first = next(tried for tried in found.tried if tried.name == "program")
    assert first.worst < found.level
    assert found.best.solution.cost > first.solution.cost
    assert found.best.strains


def test_where_nothing_withstands_the_best_of_all_is_taken() -> None:
    problem = loaded(budget=16.0)  # two replicas of each
    found = withstand(problem, EXACT, share_left(problem, 0.5))
    assert found.best.worst < found.level
    assert found.best.worst == max(tried.worst for tried in found.tried)


def test_it_ends_though_nothing_helps() -> None:
    problem = loaded()
    found = withstand(problem, EXACT, lambda placement: {NOTHING_LOST: 1.0, "a": 0.1, "b": 0.2, "c": 0.3})
    assert sum(tried.name.startswith("program") for tried in found.tried) <= ROUNDS
    assert found.best.worst == 0.1


def test_spread_is_never_undercut() -> None:
    problem = loaded(gamma=0.1)

    def favours_spread(placement: Placement) -> Mapping[str, float]:
        even = all(max(row.values()) == 1 for row in placement.ready.values())
        return {NOTHING_LOST: 1.0, "a": 0.9 if even else 0.2, "b": 1.0, "c": 1.0}

    found = withstand(problem, EXACT, favours_spread)
    assert found.level == 0.9
    assert found.best.worst == 0.9


def test_a_strain_asks_for_more_than_the_load() -> None:
    problem = loaded()
    plain, strained = (Program(problem, EXACT).solve(strains=strains) for strains in ({}, dict.fromkeys("abc", Strain(1.2))))
    assert strained.cost > plain.cost
    x = problem.arrays.counts(strained.placement)
    assert all(flows.carried(problem, x, lost, most=1.2).share == pytest.approx(1.2) for lost in range(3))


def test_a_strain_leaves_time_for_waits() -> None:
    # From c, where users of a lost a come in, s0 and s1 take 10 s there and back when they are on b.
    problem = replace(loaded(), demands=(replace(loaded().demands[0], deadline_s=11.0),))
    found = Program(problem, EXACT).solve(strains={"a": Strain(1.0, deadline=0.5)})
    assert all(found.placement.ready_on(s, "c") for s in ("s0", "s1"))


def test_what_nothing_carries_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="asked of losses: b"):
        Program(loaded(cores=1.0, rate=50.0), EXACT).solve(strains={"b": Strain(100.0)})


def test_a_budget_holds() -> None:
    problem = loaded(budget=16.0)
    found = Program(problem, EXACT).solve()
    assert 4.0 * sum(sum(row.values()) for row in found.placement.ready.values()) <= 16.0
    with pytest.raises(Infeasible, match=r"budget \(all replicas\)"):
        Program(loaded(budget=8.0), EXACT).solve()
