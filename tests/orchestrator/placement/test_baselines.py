from __future__ import annotations

import math
from dataclasses import replace

import pytest

from orchestrator.core import Node
from orchestrator.errors import Infeasible
from orchestrator.placement import flows
from orchestrator.placement.baselines import BASELINES
from orchestrator.placement.flows import cost_of
from orchestrator.placement.program import Limits, Program
from orchestrator.placement.staffing import targets
from tests.orchestrator.placement.instances import MIB, line, small


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_fits_and_is_never_cheaper_than_the_program(name: str) -> None:
    problem = line(2, 1.0)
    x = problem.arrays.counts(BASELINES[name](problem, 1))
    assert flows.fits(problem, x)
    assert {s: target.replicas for s, target in targets(problem).items()} == dict(
        zip(problem.arrays.service, x.sum(axis=1), strict=True)
    )
    assert cost_of(problem, x) >= Program(problem, Limits(gap=0.0)).solve().cost - 1e-6


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_places_the_same(name: str) -> None:
    problem = line(2, 1.0, gamma=0.5)
    assert BASELINES[name](problem, 3) == BASELINES[name](problem, 3)


@pytest.mark.parametrize("name", BASELINES)
def test_without_room_it_says_so(name: str) -> None:
    problem = line(2, 1.0)
    tiny = replace(problem, nodes=tuple(Node(node.name, 0.5, MIB) for node in problem.nodes))
    with pytest.raises(Infeasible):
        BASELINES[name](tiny, 1)


def test_spread_and_bin_pack_are_opposites() -> None:
    problem = line(2, 1.0, gamma=0.5)
    spread, packed = (problem.arrays.counts(BASELINES[name](problem, 0)) for name in ("spread", "bin-pack"))
    assert (spread.max(), spread.sum()) == (1, 4)
    assert packed.max() == 2


def test_the_heuristics_have_replicas_enough_for_any_loss_when_spread() -> None:
    problem = small(14)
    x = problem.arrays.counts(BASELINES["spread"](problem, 0))
    left = x.sum(axis=1)[:, None] - x
    assert (left.min(axis=1) >= problem.arrays.need_after_loss).all()
    assert math.isfinite(cost_of(problem, x))
