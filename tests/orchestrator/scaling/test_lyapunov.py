from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.core import Node, Service
from orchestrator.scaling import lyapunov
from orchestrator.scaling.lyapunov import Demand

ONE = Service("a", "light", 1.0, 1)


def demand(
    service: Service = ONE,
    *,
    floor: int = 0,
    most: int = 99,
    running: Mapping[str, int] | None = None,
    work: float = 0.0,
    queue: float = 0.0,
    late_weight: float = 0.0,
    cost: float = 1.0,
    start: float = 0.0,
) -> Demand:
    return Demand(service, floor, most, running or {}, work, queue, 10.0, late_weight, lambda n: 0.5**n, cost=cost, start=start)


services = st.builds(Service, st.just(""), st.just("light"), st.sampled_from([0.1, 0.5, 1.0, 2.0]), st.integers(1, 4))
demands = st.lists(
    st.builds(
        demand,
        services,
        floor=st.integers(0, 3),
        most=st.integers(3, 12),
        work=st.floats(0, 200),
        queue=st.floats(0, 100),
        late_weight=st.floats(0, 1000),
        cost=st.floats(0.01, 100),
        start=st.floats(0, 10),
    ),
    max_size=4,
).map(lambda found: [replace(d, service=replace(d.service, name=f"s{i}")) for i, d in enumerate(found)])
clusters = st.lists(st.builds(Node, st.just(""), st.floats(0.5, 8), st.integers(1, 20)), min_size=1, max_size=4).map(
    lambda found: [replace(node, name=f"n{i}") for i, node in enumerate(found)]
)


@given(demands, clusters)
def test_never_above_capacity_nor_above_the_most(wanted: Sequence[Demand], nodes: Sequence[Node]) -> None:
    chosen = lyapunov.choose(wanted, nodes)
    assert all(chosen[d.service.name] <= d.most for d in wanted)
    assert sum(chosen[d.service.name] * d.service.cpus for d in wanted) <= sum(node.cpus for node in nodes) + 1e-6
    assert sum(chosen[d.service.name] * d.service.memory_bytes for d in wanted) <= sum(node.memory_bytes for node in nodes)


@given(demands)
def test_never_below_the_floor_where_there_is_room(wanted: Sequence[Demand]) -> None:
    chosen = lyapunov.choose(wanted, [Node("n", 1e6, 10**6)])
    assert all(chosen[d.service.name] >= d.floor for d in wanted)


@given(st.floats(0, 200), st.floats(0, 100), st.floats(0, 1000), st.floats(1, 3))
def test_more_work_or_more_broken_promises_never_take_fewer(work: float, queue: float, weight: float, more: float) -> None:
    nodes = [Node("n", 50.0, 50)]

    def chosen(found: Demand) -> int:
        return lyapunov.choose([found], nodes)["a"]

    base = chosen(demand(work=work, queue=queue, late_weight=weight))
    assert chosen(demand(work=work * more, queue=queue, late_weight=weight)) >= base
    assert chosen(demand(work=work, queue=queue * more, late_weight=weight)) >= base
    assert chosen(demand(work=work, queue=queue, late_weight=weight * more)) >= base
    assert chosen(demand(work=work, queue=queue, late_weight=weight, cost=more)) <= base


@given(st.floats(0, 60), st.floats(0, 30), st.floats(0, 300), st.floats(0.1, 30), st.integers(0, 5), st.floats(0, 20))
def test_one_service_gets_the_best_there_is(
    work: float, queue: float, weight: float, cost: float, running: int, start: float
) -> None:
    """Against brute force. The savings fall with N here, and so greedy is exact but for what starts cost at once."""
    found = demand(work=work, queue=queue, late_weight=weight, cost=cost, start=start, most=12, running={"n": running})

    def objective(n: int) -> float:
        backlog = found.queue * max(0.0, found.work - n * found.served)
        return cost * n + start * max(0, n - running) + backlog + weight * found.late(n)

    best = min(objective(n) for n in range(13))
    assert objective(lyapunov.choose([found], [Node("n", 50.0, 50)])["a"]) == pytest.approx(best)


def test_a_share_that_falls_only_after_some_replicas_is_not_given_up() -> None:
    steep = replace(demand(late_weight=100.0), late=lambda n: 1.0 if n < 5 else 0.01)
    assert lyapunov.choose([steep], [Node("n", 50.0, 50)])["a"] == 5


def test_what_the_others_hold_is_not_given_twice() -> None:
    other = Service("b", "core", 3.0, 1)
    chosen = lyapunov.choose([demand(work=500.0, queue=50.0)], [Node("n", 5.0, 9), Node("m", 1.0, 9)], [(other, {"n": 1})])
    assert chosen == {"a": 3}


def test_the_virtual_queue_bounds_the_broken_share_on_every_path() -> None:
    rng = np.random.default_rng(1)
    for likely in (0.02, 0.05, 0.3):
        z = broken = ended = 0.0
        for _ in range(2000):
            tasks = float(rng.poisson(20))
            late = float(rng.binomial(int(tasks), likely))
            z = lyapunov.virtual_queue(z, late, tasks, 0.05, cap=1e12)
            broken, ended = broken + late, ended + tasks
            assert z >= 0.0
            assert broken <= 0.05 * ended + z + 1e-6
        assert (z / ended < 0.005) == (likely <= 0.05)
    assert lyapunov.virtual_queue(90.0, 50.0, 50.0, 0.05, cap=100.0) == 100.0


def toy(v: float, slots: int = 4000) -> tuple[float, float, float]:
    """Mean cost, mean backlog, and Z over tasks at the end, of slots with 0 to 8 arrivals and a replica that serves 2."""
    rng = np.random.default_rng(3)
    queue = z = cost = backlog = tasks = 0.0
    for _ in range(slots):
        found = Demand(ONE, 0, 8, {}, queue + 4.0, queue, 2.0, 0.0, lambda _: 0.0, cost=v, start=0.0)
        n = lyapunov.choose([found], [Node("n", 8.0, 8)])["a"]
        arrived = float(rng.integers(0, 9))
        late = max(0.0, queue - 2.0 * n)
        z = lyapunov.virtual_queue(z, late, arrived, 0.1, cap=1e12)
        queue, tasks, cost, backlog = late + arrived, tasks + arrived, cost + n, backlog + queue
    return cost / slots, backlog / slots, z / tasks


def test_cost_falls_and_backlog_grows_with_v_and_the_virtual_queue_is_stable_where_v_allows() -> None:
    runs = [toy(v) for v in (1.0, 4.0, 16.0, 64.0)]
    assert [cost for cost, _, _ in runs] == sorted((cost for cost, _, _ in runs), reverse=True)
    assert [backlog for _, backlog, _ in runs] == sorted(backlog for _, backlog, _ in runs)
    assert runs[0][2] < 0.001
    assert runs[-1][2] > 0.1, "too dear: the queue says so"
    assert runs[-1][1] / runs[-2][1] < 5.0, "backlog grows no faster than V"
