from __future__ import annotations

import pytest

from orchestrator.core import Node, Service, Target
from orchestrator.errors import Infeasible
from orchestrator.simulator import initial
from orchestrator.simulator.initial import Sizing
from orchestrator.simulator.world import Stage, World
from tests.orchestrator.simulator.worlds import chain, stage, world

MIB = 2**20


def mixed(core_s: float = 0.1, nodes: int = 3, cpus: float = 16.0, **options: object) -> World:
    heavy = stage("heavy", core_s)
    heavy = Stage(Service("heavy", "core", 2.0, MIB), heavy.law)
    return world([stage("light", 0.05), heavy], [chain("p", "light", "heavy", deadline_s=2.0)], nodes, cpus, **options)


@pytest.mark.parametrize("method", ["program", "spread"])
def test_core_follows_from_the_load_and_light_from_its_square_root(method: initial.Method) -> None:
    start = initial.place(mixed(), {"p": 20.0}, method, Sizing(kappa=2, gamma=0.5, beta=1.0, standby=0.5), 1)
    # r = 1 erlang of light: 1 + sqrt 1, and half a standby rounded up. 20 / (0.8 * 10) replicas of heavy.
    assert start.targets["light"] == Target(2, 1)
    assert start.targets["heavy"].replicas >= 3
    assert start.placement.target("heavy") == start.targets["heavy"]
    assert start.placement.target("light") == start.targets["light"]
    assert start.planned == 1.0


def test_where_not_all_fits_less_of_the_load_is_planned_for_and_said_so() -> None:
    start = initial.place(mixed(cpus=3.0), {"p": 60.0}, "spread", Sizing(gamma=0.0), 1)
    assert start.planned < 1.0
    with pytest.raises(Infeasible):
        initial.place(mixed(cpus=1.0), {"p": 60.0}, "spread", Sizing(), 1)


def test_a_core_service_bound_to_a_node_is_not_placed() -> None:
    heavy = Stage(Service("heavy", "core", 1.0, MIB, nodes=("n0",)), stage("heavy", 0.1).law)
    bound = World((Node("n0", 32.0, 1024 * MIB),), {"heavy": heavy}, {"p": chain("p", "heavy")})
    assert initial.problem_of(bound, {"p": 10.0}, Sizing()).services == ()
    start = initial.place(bound, {"p": 10.0}, "program", Sizing(), 1)
    assert start.placement.ready["heavy"] == {"n0": 4}


def test_offered_loads_add_up_over_pipelines_and_count_speeds() -> None:
    where = mixed(speeds={"n0": 0.5, "n1": 0.5, "n2": 0.5})
    assert initial.offered(where, {"p": 10.0}) == pytest.approx({"light": 1.0, "heavy": 2.0})
    assert where.flows == {("light", "heavy")}
