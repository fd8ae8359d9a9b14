"""The life of replicas, the same whatever they are made of."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from orchestrator.core import Placement
from orchestrator.errors import Infeasible, UsageError
from orchestrator.runtimes import keeper as keepers
from orchestrator.runtimes.records import Records
from tests.orchestrator.runtimes.world import (
    LIMIT_S,
    Kind,
    Noticeboard,
    by_state,
    keeper,
    launch,
    left_running,
    pool,
    running,
)


async def test_replicas_load_wait_and_are_let_out(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1}, {"b": 1}))
        replicas = await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (1, 1))
        assert {(r.node, r.state) for r in replicas} == {("a", "ready"), ("b", "standby")}
        assert kept.starts == 2
        states = [by_state(replicas) for _, replicas in board.history]
        assert states[1] == {"starting": ["pool-1"], "standby": [], "ready": [], "draining": []}
        kept.apply(pool({"a": 1, "b": 1}))
        assert len(by_state(kept.replicas())["ready"]) == 2, "letting a standby out takes no time at all"
        async with httpx.AsyncClient(trust_env=False) as client:
            answers = [await client.get(f"{r.url}/v2/health/ready") for r in kept.replicas()]
        assert [answer.status_code for answer in answers] == [200, 200]


async def test_a_standby_that_a_gateway_lets_out_is_at_work_until_a_decision_that_knows_of_it(
    kind: Kind, tmp_path: Path
) -> None:
    async with running(kind, tmp_path) as (kept, board):
        ordered = pool({"a": 1}, {"b": 1}, allowance=1)
        kept.apply(ordered)
        replicas = await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (1, 1))
        standby = next(r.id for r in replicas if r.state == "standby")
        assert board.allowance == {"pool": 1}
        async with httpx.AsyncClient(trust_env=False) as client:
            url = next(r.url for r in replicas if r.id == standby)
            assert (await client.get(f"{url}/v2/health/ready")).status_code == 200, "it answers before anybody is told"
        seen = kept.replicas()
        assert kept.let_out("pool", standby)
        assert board.allowance == {}, "spent"
        assert {r.id for r in kept.replicas() if r.let_out} == {standby}
        assert not kept.let_out("pool", standby), "it is at work already"
        kept.apply(ordered, seen)
        assert len(by_state(kept.replicas())["ready"]) == 2, "the decision did not know of it"
        kept.apply(replace(pool({"a": 1, "b": 1}, allowance=1), patience={"pool": 1.0}), kept.replicas())
        assert len(by_state(kept.replicas())["ready"]) == 2, "the decision keeps it"
        assert board.patience == {"pool": 1.0}
        assert not any(r.let_out for r in kept.replicas())
        kept.apply(ordered, kept.replicas())
        assert by_state(kept.replicas())["standby"] == [standby], "the decision takes it back"
        assert (board.allowance, kept.starts) == ({"pool": 1}, 2), "nothing was started in its place"


async def test_a_standby_stays_one_where_its_allowance_or_its_node_has_no_room(kind: Kind, tmp_path: Path) -> None:
    """Node b has two cores: three replicas of half a core at work leave room for one more, and not for two."""
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"b": 3}, {"b": 2}))
        await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (3, 2))
        ready, (one, two) = by_state(kept.replicas())["ready"], by_state(kept.replicas())["standby"]
        with pytest.raises(Infeasible, match="the allowance of pool is spent"):
            kept.let_out("pool", one)
        kept.apply(pool({"b": 3}, {"b": 2}, allowance=2))
        kept.let_out("pool", one)
        with pytest.raises(Infeasible, match=f"{two} cannot be let out: b lacks the cores"):
            kept.let_out("pool", two)
        for service, replica in (("pool", "pool-99"), ("encode", one)):
            with pytest.raises(UsageError, match=f"{service} has no replica"):
                kept.let_out(service, replica)
        await asyncio.to_thread(kind.kill, kept, one)
        await board.until(lambda s: one not in s["ready"])
        assert not any(r.let_out for r in kept.replicas())
        await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (3, 2))
        assert by_state(kept.replicas())["ready"] == ready, "what died is a standby again, as it was ordered"


async def test_scaling_down_drains_after_the_gateways_have_confirmed(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 2}))
        await board.until(lambda s: len(s["ready"]) == 2)
        board.confirmed.clear()
        kept.apply(pool({"a": 1}))
        (leaving,) = by_state(kept.replicas())["draining"]
        await asyncio.sleep(0.1)
        assert kind.runs(kept.runs_as(leaving)), "a gateway may still send to it"
        board.confirmed.set()
        await board.until(lambda s: not s["draining"])
        assert len(kept.replicas()) == 1


async def test_a_replica_that_does_not_go_is_killed_after_its_grace(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path, launch("stubborn", grace_s=0.2)) as (kept, board):
        kept.apply(pool({"a": 2}))
        await board.until(lambda s: len(s["ready"]) == 2)
        kept.apply(pool({"a": 1}))
        await board.until(lambda s: len(s["ready"]) == 1 and not s["draining"])


async def test_a_dead_replica_is_unrouted_at_once_and_started_again(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}))
        first, _ = await board.until(lambda s: len(s["ready"]) == 2)
        began = time.monotonic()
        await asyncio.to_thread(kind.kill, kept, first.id)
        await board.until(lambda s: first.id not in s["ready"])
        gone = next(at for at, replicas in board.history if at > began and first.id not in by_state(replicas)["ready"])
        assert gone - began < kind.unrouted_s
        replicas = await board.until(lambda s: len(s["ready"]) == 2)
        assert first.id not in {r.id for r in replicas}, "a name is never used again"
        assert kept.backoffs()["pool", first.node].failures == 1


async def test_a_replica_that_hangs_is_killed_and_started_again(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepers, "READY_ANSWER_S", 0.3)
    monkeypatch.setattr(keepers, "LIVE_PAUSE_S", 0.05)
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}))
        first, second = await board.until(lambda s: len(s["ready"]) == 2)
        await asyncio.to_thread(kind.hang, kept, first.id)
        await board.until(lambda s: first.id not in {i for ids in s.values() for i in ids})
        await board.until(lambda s: len(s["ready"]) == 2 and second.id in s["ready"])
        assert kept.backoffs()["pool", first.node].total == 1


async def test_a_standby_covers_for_a_dead_replica_before_another_is_started(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1}, {"b": 1}))
        replicas = await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (1, 1))
        ready, standby = sorted(replicas, key=lambda r: r.state)
        await asyncio.to_thread(kind.kill, kept, ready.id)
        await board.until(lambda s: s["ready"] == [standby.id])
        settled = await board.until(lambda s: len(s["ready"]) == 1 and len(s["standby"]) == 1 and not s["starting"])
        assert {r.node: r.state for r in settled} == {"a": "ready", "b": "standby"}


async def test_a_replica_that_cannot_start_is_tried_again_ever_more_slowly(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path, launch("broken")) as (kept, board):
        kept.apply(pool({"a": 1}))
        failed_at: list[float] = []
        async with asyncio.timeout(LIMIT_S):
            while len(failed_at) < 3:
                await board.news.wait()
                if kept.actions["run", "failed"] > len(failed_at):
                    failed_at.append(time.monotonic())
        assert kept.backoffs()["pool", "a"].failures == 3
        assert failed_at[2] - failed_at[1] >= 0.5, "the first pause, after the second failure in a row"


async def test_a_replica_that_is_never_ready_is_killed_and_counts_as_failed(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path, launch("mute"), timeout_s=0.3) as (kept, board):
        kept.apply(pool({"a": 1}))
        await board.until(lambda s: s["starting"] == ["pool-1"])
        await board.until(lambda s: s["starting"] == ["pool-2"])
        assert kept.backoffs()["pool", "a"].failures == 1


async def test_replacing_every_replica_never_leaves_fewer_ready(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 1, "b": 1}, {"a": 1}))
        await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (2, 1))
        old = {r.id for r in kept.replicas()}
        since = len(board.history)
        kept.relaunch({"pool": launch(generation=1)})
        await board.until(lambda s: {i for ids in s.values() for i in ids}.isdisjoint(old) and not s["starting"])
        await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (2, 1))
        assert all(len(by_state(replicas)["ready"]) >= 2 for _, replicas in board.history[since:])
        assert max(len(by_state(replicas)["draining"]) for _, replicas in board.history[since:]) == 1


async def test_a_successor_adopts_what_runs_and_disturbs_nothing(kind: Kind, tmp_path: Path) -> None:
    async with left_running(kind, tmp_path, pool({"a": 1}, {"b": 1})) as before:
        async with running(kind, tmp_path) as (kept, board):
            assert {r.id: kept.runs_as(r.id) for r in kept.replicas()} == before
            assert {r.node: r.state for r in kept.replicas()} == {"a": "ready", "b": "standby"}
            assert not any(r.outdated for r in kept.replicas())
            kept.apply(pool({"a": 1}, {"b": 1}))
            await asyncio.sleep(0.05)
            assert kept.starts == 0
            (ready,) = by_state(kept.replicas())["ready"]
            await asyncio.to_thread(kind.kill, kept, ready)
            await board.until(lambda s: ready not in s["ready"])


async def test_a_successor_replaces_what_was_started_otherwise(kind: Kind, tmp_path: Path) -> None:
    async with left_running(kind, tmp_path, pool({"a": 1}), launch(grace_s=3.0)):
        async with running(kind, tmp_path) as (kept, board):
            assert [r.outdated for r in kept.replicas()] == [True]
            kept.apply(pool({"a": 1}))
            await board.until(lambda s: s["ready"] == ["pool-2"] and not s["draining"])


async def test_a_service_that_is_not_known_any_more_is_drained(kind: Kind, tmp_path: Path) -> None:
    async with left_running(kind, tmp_path, pool({"a": 1})) as before:
        async with running(kind, tmp_path) as (kept, board):
            kept.relaunch({}, services={})
            kept.apply(Placement())
            await board.until(lambda s: not any(s.values()))
        assert not any(kind.runs(named) for named in before.values())


async def test_leaving_waits_for_a_start_that_is_under_way(kind: Kind, tmp_path: Path) -> None:
    board = Noticeboard()
    before = keeper(kind, tmp_path, board)
    await before.adopt()
    before.apply(pool({"a": 1}))
    await board.until(lambda s: s["starting"] == ["pool-1"])
    await before.leave()
    async with running(kind, tmp_path) as (after, board):
        assert [r.id for r in after.replicas()] == ["pool-1"]
        after.apply(pool({"a": 1}))
        await board.until(lambda s: s["ready"] == ["pool-1"])


async def test_leaving_at_once_after_adopting_is_no_matter(kind: Kind, tmp_path: Path) -> None:
    async with left_running(kind, tmp_path, pool({"a": 1})) as before:
        between = keeper(kind, tmp_path, Noticeboard())
        await between.adopt()
        await between.leave()
        async with running(kind, tmp_path) as (kept, _):
            assert {r.id: kept.runs_as(r.id) for r in kept.replicas()} == before


async def test_nothing_is_left_after_stopping_all(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 2, "b": 1}))
        replicas = await board.until(lambda s: len(s["ready"]) >= 1)
        urls = [r.url for r in replicas if r.url]
    assert kind.left() == 0
    assert list(Records(tmp_path / "replicas").all()) == []
    async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
        for url in urls:
            with pytest.raises(httpx.TransportError):
                await client.get(url)


async def test_stopping_all_at_once_waits_for_what_is_just_being_started(kind: Kind, tmp_path: Path) -> None:
    async with running(kind, tmp_path) as (kept, board):
        kept.apply(pool({"a": 2}))
        await board.until(lambda s: len(s["starting"]) == 2)
    assert kind.left() == 0
