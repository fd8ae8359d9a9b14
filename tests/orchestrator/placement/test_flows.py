from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.placement import flows
from tests.bench.placement import drawn
from tests.orchestrator.placement import instances
from tests.orchestrator.placement.instances import line, small


def test_load_flows_to_the_nearest_replicas() -> None:
    problem = line(2, 2.0)
    everywhere = np.ones((2, 3))
    at_a = np.array([[1.0, 0, 0], [1, 0, 0]])
    local = flows.route(problem, everywhere)
    assert local is not None
    assert (local.latency_cost, local.busiest_link) == pytest.approx((0.0, 0.0))
    routed = flows.route(problem, at_a)
    assert routed is not None
    # 40 % of one task a second travel 10 s at a weight of 2.
    assert routed.latency_cost == pytest.approx(8.0)


def test_nothing_flows_where_a_service_is_missing() -> None:
    assert flows.route(line(2, 1.0), np.array([[1.0, 0, 0], [0, 0, 0]])) is None


def test_what_is_left_is_what_the_replicas_left_can_do() -> None:
    problem = line(2, 1.0)
    loaded = replace(problem, demands=(replace(problem.demands[0], rate=190.0),))
    x = np.array([[1.0, 0, 1], [1, 0, 1]])
    assert flows.carried(loaded, x, 0).share == pytest.approx(0.5)
    assert flows.carried(loaded, x, 1).share == pytest.approx(1.0)
    assert flows.survivors(loaded, x) == pytest.approx({"a": 0.5, "b": 1.0, "c": 0.5})


def test_what_any_loss_leaves_is_what_that_loss_leaves() -> None:
    problem = drawn(0, 6, 2, 2, load=0.2)
    x = np.zeros((2, 6))
    x[:, [1, 3]] = 1.0
    each = {node.name: flows.carried(problem, x, n).share for n, node in enumerate(problem.nodes)}
    assert flows.survivors(problem, x) == pytest.approx(each)


@pytest.mark.parametrize("seed", range(12))
def test_prices_bound_the_share_of_every_other_placement(seed: int) -> None:
    problem, rng = small(seed), np.random.default_rng(seed)
    shape = problem.arrays.allowed.shape
    at = rng.integers(0, 2, shape).astype(float)
    found = flows.carried(problem, at, 0, problem.arrays.allowed)
    for _ in range(5):
        x = rng.integers(0, 3, shape).astype(float)
        other = flows.carried(problem, x, 0).share
        assert other <= found.share + float((found.prices * (x - at)).sum()) + 1e-6
        assert other == pytest.approx(instances.share_after(problem, x, 0), abs=1e-6)
