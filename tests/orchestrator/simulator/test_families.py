from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.simulator import families, laws
from orchestrator.simulator.families import CORE, TASKS, Case, Paper, Regime
from orchestrator.simulator.laws import Recorded


def draw(regime: Regime, seed: int = 1, nodes: int = 10) -> Case:
    return families.draw(Paper(regime=regime, nodes=nodes), seed)


@pytest.mark.parametrize("regime", ["milliseconds", "containers"])
def test_services_and_dags_are_the_papers(regime: Regime) -> None:
    case = draw(regime)
    tiers = [stage.service.tier for name, stage in case.world.stages.items() if not name.startswith("uplink")]
    assert (tiers.count("core"), tiers.count("light")) == (6, 9)
    assert {4, 5, 6, 8, 10, 11} == CORE
    driving = case.world.pipelines["driving"]
    parents = {step.id: step.parents - {"uplink"} for step in driving.steps}
    assert parents["s8"] == {"s5", "s7"}
    assert parents["s7"] == {"s6"}
    # Inverse trees: what a step puts out is taken once.
    for steps in TASKS.values():
        taken = [parent for _, before in steps for parent in before]
        assert len(taken) == len(set(taken)) == len(steps) - 1


@pytest.mark.parametrize("regime", ["milliseconds", "containers"])
def test_a_seed_draws_topology_and_parameters(regime: Regime) -> None:
    assert draw(regime) == draw(regime)
    one, other = draw(regime, 1), draw(regime, 2)
    assert one.world.links != other.world.links
    assert [s.law for s in one.world.stages.values()] != [s.law for s in other.world.stages.values()]


def test_three_of_ten_nodes_are_servers_and_the_gateway_is_on_one() -> None:
    world = draw("containers").world
    assert [node.name for node in world.nodes if node.name.startswith("server")] == ["server-1", "server-2", "server-3"]
    assert world.gateway_node.startswith("server")
    assert all(128 <= node.cpus <= 256 for node in world.nodes[:3])


@pytest.mark.parametrize("nodes", [3, 10, 40])
def test_links_are_the_quickest_paths(nodes: int) -> None:
    world = draw("containers", nodes=nodes).world
    names = [node.name for node in world.nodes]
    way = np.array([[world.links[a, b].transfer_s(0.7e6) if a != b else 0.0 for b in names] for a in names])
    assert np.allclose(way, way.T)
    for k in range(nodes):
        assert (way <= way[:, k, None] + way[None, k] + 1e-9).all()


def test_transfers_of_the_papers_regime_do_not_wait_for_each_other() -> None:
    world = draw("milliseconds").world
    assert all(math.isinf(link.bandwidth_bytes_per_s) for link in world.links.values())
    assert all(stage.start_s == 0.0 for name, stage in world.stages.items() if not name.startswith("uplink"))


def test_work_at_a_rate_drawn_anew_every_millisecond() -> None:
    # Far more work than a millisecond does: by the elementary renewal theorem its time is near work over the mean rate.
    times_s = families._until_done(laws.stream(1, "test"), 1000.0, 2.0, 5.0)
    assert times_s.mean() == pytest.approx(0.1, rel=0.02)
    # So little that nearly always one draw does it: E(work / rate) = work / (scale (shape - 1)).
    times_s = families._until_done(laws.stream(1, "test"), 0.001, 3.0, 5.0)
    assert times_s.mean() == pytest.approx(0.001 / 10 * 1e-3, rel=0.1)


def test_uplinks_are_where_tasks_enter_and_cost_nothing() -> None:
    world = draw("milliseconds").world
    for name, pipeline in world.pipelines.items():
        assert pipeline.steps[0].service == f"uplink-{name}"
        stage = world.stages[f"uplink-{name}"]
        assert stage.service.cpus == 0.0
        assert stage.service.nodes == (world.gateway_node,)
        assert isinstance(stage.noise, Recorded)


def test_rates_are_as_asked() -> None:
    assert sum(families.draw(Paper(rate=40.0), 1).rates.values()) == pytest.approx(40.0)
    assert sum(families.draw(Paper(rate_per_node=4.0, nodes=20), 1).rates.values()) == pytest.approx(80.0)
    # Two users of each type, at 0.15 to 1.5 tasks/ms.
    assert all(300 <= rate <= 3000 for rate in draw("milliseconds").rates.values())
