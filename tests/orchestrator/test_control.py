"""One orchestrator with real (fake) stages as processes, some of whose nodes come and go."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from orchestrator import control
from orchestrator import plan as plans
from orchestrator.control import ANNOUNCED, Orchestrator, Settings
from orchestrator.errors import Infeasible, UsageError
from orchestrator.runtimes import backoff
from orchestrator.runtimes.driver import Absence, Handle, Launch, StartFailed
from orchestrator.runtimes.processes import Processes
from orchestrator.runtimes.records import Record
from orchestrator.state_dir import StateDir
from tests.orchestrator.examples import TESTBED, export, load

LIMIT_S = 30.0
TEXT = TESTBED.replace(
    "control: {slot: 100ms, policy: manual}",
    "control: {slot: 100ms, policy: POLICY, node_grace: 500ms, node_return: 500ms}",
).replace("links:\n", "  edge-3: {cpus: 2, memory: 1GiB}\nlinks:\n")


class Boxes:
    """Which nodes are down; a replica on one of them dies with it."""

    def __init__(self, orchestrator: Orchestrator, absent: dict[str, Absence]) -> None:
        self.orchestrator, self.absent = orchestrator, absent

    def on(self, node: str) -> list[tuple[str, str]]:
        """Service and state of what is there."""
        status = self.orchestrator.status()
        replicas = [(name, r) for name, service in status["services"].items() for r in service["replicas"]]
        return sorted((name, replica["state"]) for name, replica in replicas if replica["node"] == node)

    def kill(self, node: str) -> None:
        """A node goes, and everything on it."""
        self.absent[node] = "down"
        status = self.orchestrator.status()
        for service in status["services"].values():
            for replica in service["replicas"]:
                if replica["node"] == node:
                    os.kill(replica["pid"], signal.SIGKILL)

    def nodes_of(self, service: str) -> list[str]:
        """Where it is at work."""
        replicas = self.orchestrator.status()["services"][service]["replicas"]
        return sorted(replica["node"] for replica in replicas if replica["state"] == "ready")

    def state(self, node: str) -> str:
        return str(self.orchestrator.status()["nodes"][node]["state"])

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.02)


@pytest.fixture(params=["manual", "lyapunov"])
async def boxes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Boxes]:
    monkeypatch.setattr(control, "LOOK_S", 0.02)
    absent: dict[str, Absence] = {}
    monkeypatch.setattr(Processes, "absent", lambda self, node: absent.get(node))
    models = export(tmp_path)
    settings = Settings(models, "http://127.0.0.1:9", stage_module="tests.orchestrator.fake_stage", gateway_url=ANNOUNCED)
    orchestrator = Orchestrator(
        plans.make(load(TEXT.replace("POLICY", request.param)), models), StateDir(tmp_path / "state"), settings
    )
    running = asyncio.create_task(orchestrator.run())
    found = Boxes(orchestrator, absent)
    try:
        await found.until(lambda: all(service["settled"] for service in orchestrator.status()["services"].values()))
        yield found
    finally:
        orchestrator.shut_down()
        await asyncio.wait_for(running, LIMIT_S)


async def test_a_lost_node_is_planned_without_and_taken_back_when_it_has_stayed(boxes: Boxes) -> None:
    (lost, _) = boxes.nodes_of("encode")
    boxes.kill(lost)
    await boxes.until(lambda: boxes.state(lost) == "away")
    await boxes.until(lambda: len(boxes.nodes_of("encode")) == 2)
    assert lost not in boxes.nodes_of("encode")
    assert boxes.on(lost) == []
    assert all(boxes.nodes_of(service) for service in ("tokenise", "pool"))
    moved = boxes.nodes_of("encode")
    del boxes.absent[lost]
    await boxes.until(lambda: boxes.state(lost) == "returning")
    await boxes.until(lambda: boxes.state(lost) == "up")
    await boxes.until(lambda: all(s["settled"] for s in boxes.orchestrator.status()["services"].values()))
    assert boxes.nodes_of("encode") == moved, "what runs well is not moved back"


async def test_where_starts_fail_again_and_again_something_else_is_tried(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (full, other) = boxes.nodes_of("encode")
    start = Processes.start

    async def started(driver: Processes, record: Record, launch: Launch, output: Path) -> tuple[Record, Handle]:
        if (record.service, record.node) == ("encode", full):
            raise StartFailed("no space left on device")
        return await start(driver, record, launch, output)

    monkeypatch.setattr(Processes, "start", started)
    monkeypatch.setattr(backoff, "FIRST_S", 0.02)
    monkeypatch.setattr(backoff, "LONGEST_S", 0.1)
    (replica,) = [r for r in boxes.orchestrator.status()["services"]["encode"]["replicas"] if r["node"] == full]
    os.kill(replica["pid"], signal.SIGKILL)
    await boxes.until(lambda: full not in boxes.nodes_of("encode") and len(boxes.nodes_of("encode")) == 2)
    assert other in boxes.nodes_of("encode")
    assert f"nothing more of encode on {full}" in caplog.text
    assert boxes.state(full) == "up", "others may still be there"
    boxes.orchestrator.scale("encode", 1, None)
    await boxes.until(lambda: len(boxes.nodes_of("encode")) == 1)


async def test_a_service_that_starts_nowhere_is_tried_everywhere(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, broken = Processes.start, True

    async def started(driver: Processes, record: Record, launch: Launch, output: Path) -> tuple[Record, Handle]:
        if broken and record.service == "encode":
            raise StartFailed("its model is broken")
        return await start(driver, record, launch, output)

    monkeypatch.setattr(Processes, "start", started)
    monkeypatch.setattr(backoff, "FIRST_S", 0.02)
    monkeypatch.setattr(backoff, "LONGEST_S", 0.1)
    for replica in boxes.orchestrator.status()["services"]["encode"]["replicas"]:
        os.kill(replica["pid"], signal.SIGKILL)
    await boxes.until(lambda: "tried anew everywhere" in caplog.text)
    broken = False
    await boxes.until(lambda: len(boxes.nodes_of("encode")) == 2)


async def test_a_drained_node_is_empty_and_nothing_was_missing_meanwhile(boxes: Boxes) -> None:
    (drained, _) = boxes.nodes_of("encode")
    fewest = {name: len(boxes.nodes_of(name)) for name in ("tokenise", "encode", "pool")}
    wanted = dict(fewest)
    boxes.orchestrator.drain(drained)
    while boxes.on(drained):
        for name, before in fewest.items():
            fewest[name] = min(before, len(boxes.nodes_of(name)))
        await asyncio.sleep(0.005)
    assert fewest == wanted
    assert boxes.state(drained) == "drained"
    assert len(boxes.nodes_of("encode")) == 2
    boxes.orchestrator.undrain(drained)
    await boxes.until(lambda: boxes.state(drained) == "up")


async def test_a_drain_that_leaves_no_room_is_refused(boxes: Boxes) -> None:
    with pytest.raises(UsageError, match="there is no node 'edge-9'; did you mean edge-"):
        boxes.orchestrator.drain("edge-9")
    boxes.orchestrator.drain("edge-1")
    boxes.orchestrator.drain("edge-2")
    with pytest.raises(UsageError, match="the last node there is"):
        boxes.orchestrator.drain("edge-3")
    boxes.orchestrator.undrain("edge-1")
    boxes.orchestrator.undrain("edge-2")
    boxes.orchestrator.scale("encode", 10, None)
    with pytest.raises(Infeasible):
        boxes.orchestrator.drain("edge-1")
