from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.core import Placement
from orchestrator.errors import UsageError
from orchestrator.placement.problem import Parameters, in_time
from tests.orchestrator.placement.instances import line, small


def test_users_of_a_lost_entry_come_in_through_the_others_or_everywhere() -> None:
    problem = line(2, 1.0)
    demand = problem.demands[0]
    assert problem.arrays.entry(demand).tolist() == [0.6, 0.0, 0.4]
    assert problem.arrays.entry(demand, 0).tolist() == [0.0, 0.0, 1.0]
    alone = replace(demand, entry={"a": 1.0})
    assert problem.arrays.entry(alone, 0).tolist() == [0.0, 0.5, 0.5]


def test_a_demand_of_two_entries_is_two_commodities() -> None:
    found = line(2, 1.0).arrays.commodities()
    assert [(d.rate, dict(d.entry)) for d in found] == [(0.6, {"a": 1.0}), (0.4, {"c": 1.0})]


def test_pairs_are_in_time_along_the_longest_path() -> None:
    # From a: 5 s to b and 10 s to c, and 0.1 s at each of the two services; no way back is asked for.
    problem = line(2, 1.0)
    demand = replace(problem.arrays.commodities()[0], deadline_s=5.3)
    entry, between = in_time(problem, demand, problem.arrays.allowed)
    assert entry[0].tolist() == [True, True, False]
    assert between[0].tolist() == [True, True, False]
    assert between[1].tolist() == [False, True, False]


def test_a_lost_node_serves_nobody() -> None:
    problem = line(2, 1.0)
    demand = problem.arrays.commodities(1)[0]
    entry, _ = in_time(problem, demand, problem.arrays.allowed, 1)
    assert entry[0].tolist() == [True, False, True]


def test_replicas_are_rounded_up_but_for_rounding_errors() -> None:
    problem = line(2, 1.0, gamma=0.5)
    # 80 tasks/s at 100 tasks/s and 80 % fill exactly one replica.
    full = replace(problem, demands=(replace(problem.demands[0], rate=80.0),))
    assert full.arrays.need.tolist() == [1.0, 1.0]
    more = replace(problem, demands=(replace(problem.demands[0], rate=80.1),))
    assert more.arrays.need.tolist() == [2.0, 2.0]
    assert more.arrays.need_after_loss.tolist() == [1.0, 1.0]


def test_a_placement_survives_the_arrays() -> None:
    problem = small(0)
    placed = Placement({"s0": {"a": 2}, "s1": {"b": 1}})
    assert problem.arrays.placement(problem.arrays.counts(placed)) == placed
    assert not np.any(problem.arrays.counts(Placement({"other": {"a": 1}})))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gamma": 1.5}, "gamma is 1.5; it is a share"),
        ({"utilisation": 0.0}, "utilisation is 0; it is a share"),
        ({"kappa": 0}, "kappa is 0; a service needs at least 1 node"),
        ({"link_weight": -1.0}, "link_weight is -1; it must not be negative"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Parameters(**given)  # type: ignore[arg-type]


def test_names_that_dangle_are_refused() -> None:
    problem = line(2, 1.0)
    with pytest.raises(UsageError, match="pipeline p visits s1, which is not among the services"):
        replace(problem, services=problem.services[:1])
    with pytest.raises(UsageError, match="pipeline p enters at c, which is not among the nodes"):
        replace(problem, nodes=problem.nodes[:2])
