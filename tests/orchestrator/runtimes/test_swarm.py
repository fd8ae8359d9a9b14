"""What is special to a Swarm; the life of replicas as such is in `test_keeper`, and real boxes are in tests/system."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SetupFailed
from orchestrator.runtimes import swarm as swarms
from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.keeper import Keeper
from orchestrator.runtimes.pins import Pins
from orchestrator.runtimes.swarm import Swarm, check_network
from tests.orchestrator.runtimes.fake_swarm import FakeManager
from tests.orchestrator.runtimes.test_engine import Nobody, until_a_problem
from tests.orchestrator.runtimes.world import (
    LIMIT_S,
    SwarmKind,
    by_state,
    launch,
    left_running,
    pool,
    running,
)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


def states(kept: Keeper) -> dict[str, list[str]]:
    return by_state(kept.replicas())


async def test_a_replica_is_scaled_to_none_and_its_service_removed(swarm: SwarmKind, tmp_path: Path) -> None:
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 2}))
        await board.until(lambda s: len(s["ready"]) == 2)
        kept.apply(pool({"a": 1}))
        await board.until(lambda s: len(s["ready"]) == 1 and not s["draining"])
        await until(lambda: len(swarm.manager.made) == 1)
        assert [replicas for _, replicas in swarm.manager.scaled] == [0]


async def test_a_box_that_is_lost_ends_its_replicas_and_gets_none(
    swarm: SwarmKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 2}))
        await board.until(lambda s: len(s["ready"]) == 3)
        swarm.manager.lose("b")
        replicas = await board.until(lambda s: len(s["ready"]) == 1 and not s["draining"])
        assert [r.node for r in replicas] == ["a"]
        assert kept.nodes_down == {"b"}
        starts = kept.starts
        kept.apply(pool({"a": 2, "b": 1}))
        await board.until(lambda s: len(s["ready"]) == 2)
        assert kept.starts == starts + 1, "nothing is tried on a box that is not there"
        assert {r.node for r in kept.replicas()} == {"a"}
    assert "box b: is down" in caplog.text


async def test_what_runs_on_a_box_that_comes_back_is_not_there_twice(swarm: SwarmKind, tmp_path: Path) -> None:
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}))
        await board.until(lambda s: len(s["ready"]) == 2)
        swarm.manager.lose("b")
        await board.until(lambda s: len(s["ready"]) == 1)
        assert len(swarm.manager.running()) == 2, "cut off, it still runs"
        swarm.manager.find_again("b")
        await board.until(lambda s: len(s["ready"]) == 2)
        assert kept.nodes_down == frozenset()
        await until(lambda: len(swarm.manager.running()) == 2)
        assert len(swarm.manager.made) == 2


async def test_a_paused_box_serves_on_and_gets_nothing_more(swarm: SwarmKind, tmp_path: Path) -> None:
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}))
        await board.until(lambda s: len(s["ready"]) == 2)
        swarm.manager.set_availability("b", "pause")
        await until(lambda: kept.nodes_leaving == {"b"})
        assert len(states(kept)["ready"]) == 2
        since = len(board.history)
        kept.apply(pool({"a": 2}))
        await until(lambda: [(r.node, r.state) for r in kept.replicas()] == [("a", "ready")] * 2)
        assert all(len(by_state(replicas)["ready"]) >= 2 for _, replicas in board.history[since:]), "the new one came first"


async def test_a_box_that_a_swarm_drains_drains_and_is_no_failure(swarm: SwarmKind, tmp_path: Path) -> None:
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}))
        await board.until(lambda s: len(s["ready"]) == 2)
        swarm.manager.set_availability("b", "drain")
        await board.until(lambda s: len(s["ready"]) == 1 and not s["draining"])
        assert (kept.backoffs(), kept.actions["drain", "ok"]) == ({}, 1)
        swarm.manager.set_availability("b", "active")
        await board.until(lambda s: len(s["ready"]) == 2)


async def test_a_label_makes_a_box_another_node(swarm: SwarmKind, tmp_path: Path) -> None:
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"b": 1}))
        await board.until(lambda s: len(s["ready"]) == 1)
        swarm.manager.by_id["box-b"]["Spec"]["Labels"]["espalier.node"] = "elsewhere"
        swarm.manager.tell()
        await until(lambda: kept.nodes_down == {"b"})
        swarm.manager.add_box("machine", **{"espalier.node": "b"})
        swarm.manager.tell()
        await until(lambda: not kept.nodes_down)
        kept.apply(pool({"b": 2}))
        await board.until(lambda s: len(s["ready"]) == 2)
        assert {task.box for task in swarm.manager.running()} == {"box-b", "box-machine"}


async def test_a_task_that_finds_no_place_is_a_failed_start_that_leaves_nothing(
    swarm: SwarmKind, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarms, "PLACED_S", 0.3)
    swarm.manager.pending.add("box-b")
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}))
        await board.until(lambda s: len(s["ready"]) == 1)
        await until(lambda: kept.actions["run", "failed"] > 0)
        assert "could not be started: its task did not run: pending no suitable node" in caplog.text
    assert swarm.left() == 0


async def test_a_manager_that_is_away_changes_nothing_until_it_is_back(swarm: SwarmKind, tmp_path: Path) -> None:
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}))
        replicas = await board.until(lambda s: len(s["ready"]) == 2)
        swarm.manager.cut()
        await until_a_problem(kept)
        swarm.kill(kept, "pool-1")
        kept.apply(pool({"a": 2, "b": 1}))
        await asyncio.sleep(0.3)
        assert kept.replicas() == replicas, "nobody knows better"
        swarm.manager.away = False
        await board.until(lambda s: "pool-1" not in s["ready"] and len(s["ready"]) == 3 and not s["starting"])
        assert kept.problem is None


async def test_a_service_that_nobody_knows_is_removed(swarm: SwarmKind, tmp_path: Path) -> None:
    async with left_running(swarm, tmp_path, pool({"a": 1})):
        (service,) = swarm.manager.made.values()
        stray = {**service["Spec"], "Name": "stray", "Labels": {"espalier.scope": swarm.options.scope}}
        await swarm.manager.create_service(stray)
        async with running(swarm, tmp_path) as (_, board):
            await board.until(lambda s: s["ready"] == ["pool-1"])
            await until(lambda: len(swarm.manager.made) == 1)
            await swarm.manager.create_service(stray)
            swarm.manager.tell()
            await until(lambda: len(swarm.manager.made) == 1)


async def test_what_a_task_that_died_had_to_say_is_told_and_kept(
    swarm: SwarmKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(swarm, tmp_path, launch("broken")) as (kept, _):
        kept.apply(pool({"a": 1}))
        await until(lambda: kept.actions["run", "failed"] > 0)
        await until(lambda: "pool-1 | what it wrote" in caplog.text)
        assert "failed non-zero exit (7)" in caplog.text
        assert (tmp_path / "logs" / "pool-1.log").read_text() == "what it wrote\n"


class NotAManager(FakeManager):
    async def boxes(self) -> list[dict[str, Any]]:
        raise Unreachable("the engine behind x does not answer: This node is not a swarm manager.")


@pytest.mark.parametrize(
    ("manager", "said"),
    [
        (NotAManager(), "the engine at fake manages no Swarm: docker swarm init there, or name a manager"),
        (FakeManager(away=True), "does not answer; name a manager of the Swarm by DOCKER_HOST or a Docker context"),
        (FakeManager(images={}), "image fake:1 is not on this engine"),
        (FakeManager(net=None), "there is no network fake in this Swarm: docker network create -d overlay"),
        (FakeManager(net={"Driver": "bridge"}), "network fake is no overlay"),
    ],
)
async def test_what_is_missing_is_said_before_anything_is_started(
    swarm: SwarmKind, tmp_path: Path, manager: FakeManager, said: str
) -> None:
    driver = Swarm(swarm.options, Pins(tmp_path / "images.json"), manager)
    with pytest.raises(SetupFailed, match=said):
        await driver.open(Nobody())


def test_who_is_not_on_the_stages_network_is_told_so() -> None:
    network = {"Driver": "overlay", "IPAM": {"Config": [{"Subnet": "10.0.1.0/24"}]}}
    with pytest.raises(SetupFailed, match="this orchestrator is not attached to the network edge"):
        check_network("edge", network, ["127.0.0.1", "10.0.2.7"])
    check_network("edge", network, ["127.0.0.1", "10.0.1.7"])


async def test_another_image_is_news_and_an_update_takes_it_up(
    swarm: SwarmKind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(swarm, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1}))
        await board.until(lambda s: s["ready"] == ["pool-1"])
        swarm.manager.images["fake:1"] = "sha256:" + "b" * 64
        assert not any(r.outdated for r in kept.replicas())
        await kept.refresh()
        await board.until(lambda s: s["ready"] == ["pool-2"] and not s["draining"])
        used = [s["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"][7] for s in swarm.manager.made.values()]
        assert "b" in used
