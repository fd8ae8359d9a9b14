from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import SetupFailed
from orchestrator.runtimes import child as children
from orchestrator.runtimes.doorkeeper import NAME, Door, Doorkeeper
from orchestrator.runtimes.records import Record

ROOT = Path(__file__).resolve().parents[3]


def doorkeeper(tmp_path: Path, deaths: list[str] | None = None, port: int = 0) -> Doorkeeper:
    argv = (sys.executable, "-m", "tests.orchestrator.fake_gateway", "--routes-url", "http://127.0.0.1:9/v1/routes")
    return Doorkeeper(
        state_dir=tmp_path,
        argv=(*argv, "--routes-file", str(tmp_path / "routes.json")),
        door=Door("a", "127.0.0.1", port),
        environment=children.environment(ROOT),
        on_death=(deaths if deaths is not None else []).append,
    )


async def until(door: Doorkeeper, condition: Callable[[Record], bool]) -> Record:
    async with asyncio.timeout(15):
        while door.record is None or not condition(door.record):
            await asyncio.sleep(0.01)
    return door.record


async def test_a_gateway_that_dies_comes_back_on_the_same_port(tmp_path: Path) -> None:
    deaths: list[str] = []
    door = doorkeeper(tmp_path, deaths)
    await door.open()
    first = await until(door, lambda record: record.state == "ready")
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    again = await until(door, lambda record: record.pid != first.pid and record.state == "ready")
    assert again.url == first.url
    assert deaths == [NAME]
    await door.close()
    assert again.identity is not None
    assert not children.recognise(again.identity)


async def test_a_successor_adopts_the_gateway(tmp_path: Path) -> None:
    before = doorkeeper(tmp_path)
    await before.open()
    record = await until(before, lambda record: record.state == "ready")
    await before.leave()
    after = doorkeeper(tmp_path)
    await after.open()
    assert after.record == record
    await after.close()
    assert not list((tmp_path / "gateways").glob("*.json"))


async def test_a_gateway_for_another_address_makes_way(tmp_path: Path) -> None:
    before = doorkeeper(tmp_path)
    await before.open()
    old = await until(before, lambda record: record.state == "ready")
    await before.leave()
    after = Doorkeeper(
        state_dir=tmp_path,
        argv=old.argv[: old.argv.index("--node")],
        door=Door("b", "127.0.0.1", 0),
        environment=children.environment(ROOT),
        on_death=lambda _: None,
    )
    await after.open()
    new = await until(after, lambda record: record.state == "ready")
    assert (new.node, new.pid != old.pid) == ("b", True)
    assert old.identity is not None
    assert not children.recognise(old.identity)
    await after.close()


async def test_a_port_that_is_taken_is_said_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        door = doorkeeper(tmp_path, port=port)
        with pytest.raises(SetupFailed, match=rf"cannot have 127\.0\.0\.1:{port}: Address already in use; free it"):
            await door.open()
        await door.leave()
