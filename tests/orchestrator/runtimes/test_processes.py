from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from orchestrator.core import Node, Placement, Replica, Service
from orchestrator.runtimes import child as children
from orchestrator.runtimes.processes import Launch, Processes
from orchestrator.runtimes.records import Records
from tests.orchestrator.runtimes.test_records import EXAMPLE

ROOT = Path(__file__).resolve().parents[3]
NODES = {"a": Node("a", 2.0, 2**30), "b": Node("b", 2.0, 2**30)}
SERVICE = Service("pool", "light", 0.5, 2**26)
LIMIT_S = 15.0


class Noticeboard:
    """Stands for the publisher: keeps every state of the replicas, with its time, and lets a test hold back confirmations."""

    def __init__(self) -> None:
        self.history: list[tuple[float, tuple[Replica, ...]]] = []
        self.news = asyncio.Event()
        self.confirmed = asyncio.Event()
        self.confirmed.set()

    def publish(self, replicas: Sequence[Replica]) -> int:
        if not self.history or self.history[-1][1] != tuple(replicas):
            self.history.append((time.monotonic(), tuple(replicas)))
        self.news.set()
        self.news = asyncio.Event()
        return len(self.history)

    async def acknowledged(self, version: int, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self.confirmed.wait()
        except TimeoutError:
            return False
        return True

    async def until(self, condition: Callable[[dict[str, list[str]]], bool]) -> tuple[Replica, ...]:
        """Wait until state -> ids, of what is published, is as wanted."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                replicas = self.history[-1][1] if self.history else ()
                if condition(by_state(replicas)):
                    return replicas
                await self.news.wait()


def by_state(replicas: Sequence[Replica]) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {"starting": [], "standby": [], "ready": [], "draining": []}
    for replica in replicas:
        states[replica.state].append(replica.id)
    return states


def launch(stage: str = "pool", grace_s: float = 2.0, generation: int = 0) -> dict[str, Launch]:
    argv = (sys.executable, "-m", "tests.orchestrator.fake_stage", "--stage", stage, "--service", "pool")
    return {"pool": Launch(argv, grace_s, generation)}


def runtime(
    tmp_path: Path, board: Noticeboard, launches: dict[str, Launch] | None = None, timeout_s: float = 10.0
) -> Processes:
    return Processes(
        state_dir=tmp_path, launches=launches or launch(), services={"pool": SERVICE}, nodes=NODES, routing=board,
        environment=children.environment(ROOT), start_timeout_s=timeout_s,
    )  # fmt: skip


@asynccontextmanager
async def running(
    tmp_path: Path, launches: dict[str, Launch] | None = None, timeout_s: float = 10.0
) -> AsyncIterator[tuple[Processes, Noticeboard]]:
    board = Noticeboard()
    processes = runtime(tmp_path, board, launches, timeout_s)
    try:
        yield processes, board
    finally:
        await processes.stop_all()


def pool(ready: dict[str, int], standby: dict[str, int] | None = None) -> Placement:
    return Placement({"pool": ready}, {"pool": standby or {}})


async def test_replicas_load_wait_and_are_let_out(tmp_path: Path) -> None:
    async with running(tmp_path) as (processes, board):
        processes.apply(pool({"a": 1}, {"b": 1}))
        replicas = await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (1, 1))
        assert {(r.node, r.state) for r in replicas} == {("a", "ready"), ("b", "standby")}
        assert processes.starts == 2
        states = [by_state(replicas) for _, replicas in board.history]
        assert states[1] == {"starting": ["pool-1"], "standby": [], "ready": [], "draining": []}
        processes.apply(pool({"a": 1, "b": 1}))
        assert len(by_state(processes.replicas())["ready"]) == 2, "letting a standby out takes no time at all"


async def test_scaling_down_drains_after_the_gateways_have_confirmed(tmp_path: Path) -> None:
    async with running(tmp_path) as (processes, board):
        processes.apply(pool({"a": 2}))
        await board.until(lambda s: len(s["ready"]) == 2)
        board.confirmed.clear()
        processes.apply(pool({"a": 1}))
        (leaving,) = by_state(processes.replicas())["draining"]
        await asyncio.sleep(0.1)
        assert psutil.pid_exists(processes.pid(leaving)), "a gateway may still send to it"
        board.confirmed.set()
        await board.until(lambda s: not s["draining"])
        assert len(processes.replicas()) == 1


async def test_a_replica_that_does_not_go_is_killed_after_its_grace(tmp_path: Path) -> None:
    async with running(tmp_path, launch("stubborn", grace_s=0.2)) as (processes, board):
        processes.apply(pool({"a": 2}))
        await board.until(lambda s: len(s["ready"]) == 2)
        processes.apply(pool({"a": 1}))
        await board.until(lambda s: len(s["ready"]) == 1 and not s["draining"])


async def test_a_dead_replica_is_unrouted_at_once_and_started_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (processes, board):
        processes.apply(pool({"a": 1, "b": 1}))
        first, _ = await board.until(lambda s: len(s["ready"]) == 2)
        began = time.monotonic()
        os.kill(processes.pid(first.id), signal.SIGKILL)
        await board.until(lambda s: first.id not in s["ready"])
        assert board.history[-1][0] - began < 0.2
        replicas = await board.until(lambda s: len(s["ready"]) == 2)
        assert first.id not in {r.id for r in replicas}, "a name is never used again"
        assert processes.backoffs()["pool", first.node].failures == 1


async def test_a_standby_covers_for_a_dead_replica_before_another_is_started(tmp_path: Path) -> None:
    async with running(tmp_path) as (processes, board):
        processes.apply(pool({"a": 1}, {"b": 1}))
        replicas = await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (1, 1))
        ready, standby = sorted(replicas, key=lambda r: r.state)
        os.kill(processes.pid(ready.id), signal.SIGKILL)
        await board.until(lambda s: s["ready"] == [standby.id])
        settled = await board.until(lambda s: len(s["ready"]) == 1 and len(s["standby"]) == 1 and not s["starting"])
        assert {r.node: r.state for r in settled} == {"a": "ready", "b": "standby"}


async def test_a_replica_that_cannot_start_is_tried_again_ever_more_slowly(tmp_path: Path) -> None:
    async with running(tmp_path, launch("broken")) as (processes, board):
        processes.apply(pool({"a": 1}))
        async with asyncio.timeout(LIMIT_S):
            while processes.backoffs().get(("pool", "a")) is None or processes.backoffs()["pool", "a"].failures < 3:
                await board.news.wait()
        starts = [at for at, replicas in board.history if replicas]
        assert len(starts) == 3
        assert starts[1] - starts[0] < 0.45
        assert 0.5 <= starts[2] - starts[1] < 2.0
        assert processes.actions["run", "failed"] == 3


async def test_a_replica_that_is_never_ready_is_killed_and_counts_as_failed(tmp_path: Path) -> None:
    async with running(tmp_path, launch("mute"), timeout_s=0.3) as (processes, board):
        processes.apply(pool({"a": 1}))
        await board.until(lambda s: s["starting"] == ["pool-1"])
        await board.until(lambda s: s["starting"] == ["pool-2"])
        assert processes.backoffs()["pool", "a"].failures == 1


async def test_replacing_every_replica_never_leaves_fewer_ready(tmp_path: Path) -> None:
    async with running(tmp_path) as (processes, board):
        processes.apply(pool({"a": 1, "b": 1}, {"a": 1}))
        await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (2, 1))
        old = {r.id for r in processes.replicas()}
        since = len(board.history)
        processes.relaunch(launch(generation=1))
        await board.until(lambda s: {i for ids in s.values() for i in ids}.isdisjoint(old) and not s["starting"])
        await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (2, 1))
        assert all(len(by_state(replicas)["ready"]) >= 2 for _, replicas in board.history[since:])
        assert max(len(by_state(replicas)["draining"]) for _, replicas in board.history[since:]) == 1


async def test_a_successor_adopts_what_runs_and_disturbs_nothing(tmp_path: Path) -> None:
    board = Noticeboard()
    before = runtime(tmp_path, board)
    before.apply(pool({"a": 1}, {"b": 1}))
    await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (1, 1))
    pids = {r.id: before.pid(r.id) for r in before.replicas()}
    await before.leave()

    async with running(tmp_path) as (after, board):
        assert after.adopt() == 2
        assert {r.id: after.pid(r.id) for r in after.replicas()} == pids
        assert not any(r.outdated for r in after.replicas())
        after.apply(pool({"a": 1}, {"b": 1}))
        await asyncio.sleep(0.05)
        assert after.starts == 0
        (ready,) = by_state(after.replicas())["ready"]
        os.kill(pids[ready], signal.SIGKILL)
        await board.until(lambda s: ready not in s["ready"])


async def test_a_successor_with_another_command_line_replaces_what_it_finds(tmp_path: Path) -> None:
    board = Noticeboard()
    before = runtime(tmp_path, board)
    before.apply(pool({"a": 1}))
    await board.until(lambda s: len(s["ready"]) == 1)
    await before.leave()
    other = launch()["pool"]
    async with running(tmp_path, {"pool": Launch((*other.argv, "--cpus", "1"), 2.0)}) as (after, board):
        after.adopt()
        assert [r.outdated for r in after.replicas()] == [True]
        after.apply(pool({"a": 1}))
        await board.until(lambda s: s["ready"] == ["pool-2"] and not s["draining"])


async def test_a_record_of_a_foreign_process_is_dropped_and_the_process_left_alone(tmp_path: Path) -> None:
    board = Noticeboard()
    before = runtime(tmp_path, board)
    before.apply(pool({"a": 1}))
    await board.until(lambda s: len(s["ready"]) == 1)
    await before.stop_all()
    records = Records(tmp_path / "replicas")
    records.save(EXAMPLE.model_copy(update={"pid": os.getpid(), "create_time": psutil.Process().create_time()}))
    async with running(tmp_path) as (after, _):
        assert after.adopt() == 0
        assert list(records.all()) == []
    assert psutil.pid_exists(os.getpid())


async def test_nothing_is_left_after_stopping_all(tmp_path: Path) -> None:
    async with running(tmp_path) as (processes, board):
        processes.apply(pool({"a": 2, "b": 1}))
        replicas = await board.until(lambda s: len(s["ready"]) >= 1)
        pids = [processes.pid(r.id) for r in replicas]
        urls = [r.url for r in replicas]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert list(Records(tmp_path / "replicas").all()) == []
    for url in urls:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0


async def test_a_program_that_is_not_there_is_a_failure_like_another(tmp_path: Path) -> None:
    async with running(tmp_path, {"pool": Launch(("/nonexistent",), 1.0)}) as (processes, _):
        processes.apply(pool({"a": 1}))
        async with asyncio.timeout(LIMIT_S):
            while not processes.actions["run", "failed"]:
                await asyncio.sleep(0.01)
        assert processes.replicas() == ()
