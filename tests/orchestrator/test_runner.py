from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator import replay
from orchestrator import runner as runners
from orchestrator.core import Observation, Placement, Replica, Target
from orchestrator.costs import Prices
from orchestrator.decision_log import DecisionLog
from orchestrator.metrics import Metrics
from orchestrator.runner import Runner
from tests.orchestrator.scaling.test_manual import POLICY, seen
from tests.orchestrator.test_decision_log import ORIGIN


class Eyes:
    """Telemetry that tells what a test says, or fails."""

    def __init__(self) -> None:
        self.broken = False
        self.looks = 0

    async def observe(self, t: float, replicas: Sequence[Replica]) -> Observation:
        self.looks += 1
        if self.broken:
            raise RuntimeError("blind")
        return seen(t=t)


class Hands:
    """A runtime that writes down its orders and holds one replica."""

    starts = 0

    def __init__(self) -> None:
        self.applied: list[Placement] = []
        self.seen: Sequence[Replica] = ()

    def replicas(self) -> tuple[Replica, ...]:
        return (Replica("encode-1", "encode", "a", "ready", 0.5, 1),)

    def apply(self, desired: Placement, seen: Sequence[Replica] = ()) -> None:
        self.applied.append(desired)
        self.seen = seen


class World:
    def __init__(self, tmp_path: Path, slot_s: float = 0.01) -> None:
        self.eyes, self.hands, self.metrics = Eyes(), Hands(), Metrics()
        self.orders: dict[str, Target] = {}
        self.t = 0.0
        self.path = tmp_path / "decisions.jsonl"
        self.runner = Runner(
            policy=POLICY, telemetry=self.eyes, runtime=self.hands, decisions=DecisionLog(self.path, lambda: ORIGIN),
            orders=lambda: self.orders, version=lambda: 1, metrics=self.metrics, prices=Prices(start=3.0), slot_s=slot_s,
            clock=lambda: self.t,
        )  # fmt: skip


async def test_a_slot_observes_decides_applies_and_logs(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.runner.tick()
    world.orders["pool"] = Target(2, 0)
    await world.runner.tick()
    assert [applied.target("pool") for applied in world.hands.applied] == [Target(1, 1), Target(2, 0)]
    again = replay.replay(world.path)
    assert (again.slots, again.different) == (2, 0)
    assert b'espalier_controller_actions_total{action="apply",result="ok"} 2.0' in world.metrics.exposition()


async def test_a_decision_is_applied_together_with_what_was_seen_when_it_was_made(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.runner.tick()
    assert world.hands.seen == world.hands.replicas()


async def test_a_hold_applies_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.orders["encode"] = Target(50)
    await world.runner.tick()
    assert world.hands.applied == []
    assert world.runner.decision is not None
    assert world.runner.decision.desired is None


async def test_a_slot_that_fails_is_counted_and_the_next_one_comes(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.eyes.broken = True
    loop = asyncio.create_task(world.runner.run())
    async with asyncio.timeout(5):
        while world.eyes.looks < 3:
            await asyncio.sleep(0.005)
        world.eyes.broken = False
        while not world.hands.applied:
            await asyncio.sleep(0.005)
    loop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loop
    assert world.runner.failed_slots >= 3
    assert b'espalier_controller_actions_total{action="tick",result="failed"}' in world.metrics.exposition()


async def test_control_goes_on_where_the_decision_log_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory in the log's place stands for the full disk."""
    caplog.set_level(logging.INFO, "orchestrator.runner")
    world = World(tmp_path)
    world.path.mkdir()
    for _ in range(3):
        await world.runner.tick()
    assert len(world.hands.applied) == 3
    assert world.runner.decision is not None
    assert world.runner.decision.reason == "as ordered: encode 2, pool 1+1", "the state goes on too"
    assert b'espalier_controller_actions_total{action="log",result="failed"} 3.0' in world.metrics.exposition()
    world.path.rmdir()
    await world.runner.tick()
    said = [record.message for record in caplog.records if "decision log" in record.message]
    assert [line.partition(":")[0] for line in said] == [
        "the decision log cannot be written, control goes on without it", "the decision log is written again",
    ]  # fmt: skip
    assert replay.replay(world.path).different == 0


async def test_an_order_ends_the_wait_between_slots(tmp_path: Path) -> None:
    world = World(tmp_path, slot_s=60.0)
    loop = asyncio.create_task(world.runner.run())
    async with asyncio.timeout(5):
        while world.eyes.looks < 1:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        world.runner.wake()
        while world.eyes.looks < 2:
            await asyncio.sleep(0.005)
    loop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loop


async def test_the_cost_is_that_of_the_time_between_the_slots(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.t, world.hands.starts = 10.0, 2
    await world.runner.tick()
    assert (world.runner.cost.replicas, world.runner.cost.starts) == (5.0, 6.0)


async def test_many_nudges_begin_one_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "NUDGE_S", 0.02)
    world = World(tmp_path, slot_s=60.0)
    loop = asyncio.create_task(world.runner.run())
    async with asyncio.timeout(5):
        for looks in (1, 2, 3):
            while world.eyes.looks < looks:
                await asyncio.sleep(0.001)
            for _ in range(100):
                world.runner.nudge()
            assert world.eyes.looks == looks, "not at once"
        while world.eyes.looks < 4:
            await asyncio.sleep(0.001)
        assert world.runner._nudged is None, "and no further one is to come"
    loop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loop
