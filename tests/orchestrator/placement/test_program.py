from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from orchestrator.core import Node, Placement
from orchestrator.errors import Infeasible
from orchestrator.placement import flows, program
from orchestrator.placement.flows import cost_of
from orchestrator.placement.formulation import Compiled, Model
from orchestrator.placement.problem import Demand, Edge, Hosted, Parameters, Problem, Visit
from orchestrator.placement.program import Clock, Limits, Program
from tests.bench.placement import drawn
from tests.orchestrator.placement import instances
from tests.orchestrator.placement.instances import both_ways, line, small

EXACT = Limits(gap=0.0)


@pytest.mark.parametrize(
    ("cores", "weight", "cost"),
    [(1, 0.5, 12.5), (1, 1.0, 17.0), (1, 1.2, 18.0), (1, 2.0, 22.0), (2, 0.5, 10.0), (2, 1.0, 12.0), (2, 1.2, 12.8)],
)
def test_the_case_worked_by_hand(cores: float, weight: float, cost: float) -> None:
    assert Program(line(cores, weight), EXACT).solve().cost == pytest.approx(cost)


def test_surviving_any_loss_puts_both_services_at_both_ends() -> None:
    found = Program(line(2, 0.5, gamma=0.5), EXACT).solve()
    assert found.cost == pytest.approx(16.0)
    assert found.placement == Placement({"s0": {"a": 1, "c": 1}, "s1": {"a": 1, "c": 1}})


@pytest.mark.parametrize("seed", range(90))  # more than 50 of these have a solution
def test_as_cheap_as_brute_force(seed: int) -> None:
    problem = small(seed)
    best = instances.cheapest(problem)
    if math.isinf(best):
        with pytest.raises(Infeasible, match="The smallest relaxation: "):
            Program(problem, EXACT).solve()
        return
    found = Program(problem, EXACT).solve()
    assert found.cost == pytest.approx(best, rel=1e-5)
    x = problem.arrays.counts(found.placement)
    assert flows.fits(problem, x)
    assert cost_of(problem, x) == pytest.approx(found.cost, rel=1e-5)
    for n, node in enumerate(problem.nodes):
        share = instances.share_after(problem, x, n)
        assert share >= problem.parameters.gamma - 1e-6
        assert found.carried[node.name] == pytest.approx(share, abs=1e-6)


def pair(cores: float = 4.0, *, deadline_s: float = 1.0, bandwidth: float = 1e6, **parameters: object) -> Problem:
    """Two nodes 10 ms apart; tasks enter at a, visit s0 and carry 1 kB there. One replica does 20 tasks/s."""
    nodes = tuple(Node(name, cores, 1000 * instances.MIB) for name in "ab")
    edges = (Edge(None, "1", 1000.0), Edge("1", None, 1000.0))
    demand = Demand("p", 10.0, deadline_s, (Visit("1", "s0"),), edges, {"a": 1.0})
    chosen = Parameters(**{"kappa": 1, "gamma": 0.0, **parameters})  # type: ignore[arg-type]
    return Problem(
        nodes, (Hosted(instances.service("s0"), 0.05, 20.0),), (demand,), both_ways({("a", "b"): 0.01}),
        both_ways({("a", "b"): bandwidth}), parameters=chosen,
    )  # fmt: skip


def elsewhere(problem: Problem) -> Problem:
    """The same where s0 may run on b only."""
    hosted = replace(problem.services[0], service=instances.service("s0", nodes=("b",)))
    return replace(problem, services=(hosted,))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (pair(kappa=3), r"in the way: diversity\. The smallest relaxation: diversity \(s0\) by 1 nodes"),
        (pair(0.5), r"in the way: capacity\. The smallest relaxation: capacity \(cpus of a\) by 0\.5 cpus"),
        (pair(kappa=2, most_nodes=1), r"in the way: (diversity|sparsity)\. The smallest relaxation: \w+ \(s0\) by 1 nodes"),
        (elsewhere(pair(deadline_s=0.06)), r"in the way: deadline\. The smallest relaxation: deadline \(p\) by 2 late hops"),
        (
            elsewhere(pair(bandwidth=10_000.0)),
            r"in the way: bandwidth\. The smallest relaxation: bandwidth \(a -> b\) by 0\.2 of",
        ),
        (
            elsewhere(pair(gamma=0.5)),
            r"in the way: survival\. The smallest relaxation: survival \(s0 without b\) by 1 replicas",
        ),
        (replace(pair(), reserve=(8.0, 0.0, 0.0)), r"in the way: (light reserve|capacity)\. .* by 1 cpus$"),
    ],
)
def test_infeasible_names_what_is_in_the_way(problem: Problem, message: str) -> None:
    with pytest.raises(Infeasible, match=message):
        Program(problem, EXACT).solve()


def test_a_loss_that_capacity_alone_would_pass_makes_cuts() -> None:
    # Without c, the only entry, its users come in at a and b, where b is too far from a to be in time.
    found = Program(small(38), EXACT).solve()
    assert "c" in found.cuts
    assert found.rounds > 1
    assert min(found.carried.values()) >= small(38).parameters.gamma - 1e-6


def test_equal_questions_get_equal_answers() -> None:
    first, second = (Program(small(14), EXACT).solve() for _ in range(2))
    assert first == replace(second, solve_s=first.solve_s)


def test_among_equal_nodes_the_first_is_taken() -> None:
    problem = replace(pair(), latencies_s={}, bandwidths={})
    assert Program(problem, EXACT).solve().placement == Placement({"s0": {"a": 1}})


def test_what_runs_stays_unless_moving_pays() -> None:
    running = Placement({"s0": {"b": 1}})
    # On b every task spends 20 ms on the way and 2 ms sending: 0.22 per second more than on a.
    assert Program(pair(move_price=0.3), EXACT).solve(running).placement == running
    assert Program(pair(move_price=0.1), EXACT).solve(running).placement == Placement({"s0": {"a": 1}})


def test_demand_is_a_parameter_of_a_compiled_program() -> None:
    program = Program(pair(), EXACT)
    assert program.solve().placement == Placement({"s0": {"a": 1}})
    assert program.solve(rates=[50.0]).placement == Placement({"s0": {"a": 4}})
    assert program.solve().placement == Placement({"s0": {"a": 1}})


def test_no_time_gives_the_greedy_placement_and_says_so() -> None:
    found = Program(small(14), Limits(time_s=0.0)).solve()
    assert found.status == "greedy"
    assert found.gap is None


def test_candidates_that_are_too_few_give_way_to_all_nodes() -> None:
    # The far node is the only one with memory enough; the twelve near ones have cores.
    near = tuple(Node(f"n{i:02}", 64.0, instances.MIB) for i in range(13))
    problem = pair()
    hosted = replace(problem.services[0], service=instances.service("s0", memory_mib=500))
    problem = replace(
        problem, nodes=(*near, Node("far", 1.0, 1000 * instances.MIB)), services=(hosted,),
        demands=(replace(problem.demands[0], entry={"n00": 1.0}),), latencies_s={}, bandwidths={},
    )  # fmt: skip
    assert Program(problem, EXACT).solve().placement == Placement({"s0": {"far": 1}})


@pytest.mark.parametrize("seed", range(3))
def test_a_large_testbed_is_placed_within_the_gap_of_what_the_whole_program_finds(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, limits = drawn(seed, 14, 5, 3, load=0.25), Limits(gap=0.02)
    by_parts = Program(problem, limits, prune=False).solve()
    monkeypatch.setattr(program, "PRUNE_ABOVE", 14)
    at_once = Program(problem, limits).solve()
    assert by_parts.status == at_once.status == "optimal"
    for found, other in ((by_parts, at_once), (at_once, by_parts)):
        assert found.bound is not None
        assert found.bound <= other.cost + 1e-6
        assert found.cost == pytest.approx(cost_of(problem, problem.arrays.counts(found.placement)), rel=1e-4)
    assert by_parts.cost * (1.0 - limits.gap) <= at_once.cost + 1e-6


def test_parts_only_make_a_placement_cheaper() -> None:
    problem = drawn(1, 14, 8, 4, load=0.3)
    model = Model(problem, problem.arrays.allowed)
    model.set(problem, None)
    task = Compiled.of(model, ()).task
    assert program._run(task, Clock(60.0), 0.2) == "found"
    first = float(task.value)
    best = program._improved(model, task, 0.01, Clock(60.0), first - 1e-3, problem.arrays.allowed)
    assert best <= first - 1e-3
    assert cost_of(problem, np.round(model.x.value)) == pytest.approx(best, rel=1e-4)


def test_a_service_without_load_has_the_replicas_that_are_asked_for() -> None:
    problem = replace(pair(), demands=())
    assert Program(problem, EXACT).solve().placement == Placement({"s0": {"a": 1}})
