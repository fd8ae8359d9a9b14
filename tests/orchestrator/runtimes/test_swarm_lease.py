from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from orchestrator.lease import Claim, Lease
from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.engine_api import Refused
from orchestrator.runtimes.swarm_lease import LABEL, SwarmStore

A, B = Claim(holder="a", term=1), Claim(holder="b", term=2)


class Manager:
    """Configs as a manager keeps them."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[int, dict[str, str]]] = {}
        self.away = False

    async def config(self, name: str) -> Mapping[str, Any] | None:
        if self.away:
            raise Unreachable("no answer")
        await asyncio.sleep(0)
        if name not in self.kept:
            return None
        version, labels = self.kept[name]
        return {"Version": {"Index": version}, "Spec": {"Name": name, "Labels": labels}}

    async def create_config(self, name: str, labels: Mapping[str, str]) -> None:
        await asyncio.sleep(0)
        if name in self.kept:
            raise Refused(409, "rpc error: code = AlreadyExists")
        self.kept[name] = (1, dict(labels))

    async def label_config(self, name: str, version: int, labels: Mapping[str, str]) -> None:
        await asyncio.sleep(0)
        if self.kept[name][0] != version:
            raise Refused(500, "rpc error: code = Unknown desc = update out of sequence")
        self.kept[name] = (version + 1, dict(labels))


async def test_a_swap_needs_what_was_there() -> None:
    store = SwarmStore(Manager(), "edge")
    assert await store.read() is None
    assert not await store.write(B, A)
    assert await store.write(A, None)
    assert not await store.write(B, None)
    assert await store.write(B, A)
    assert await store.read() == B


@pytest.mark.parametrize("before", [None, A])
async def test_of_many_that_take_it_at_once_one_gets_it(before: Claim | None) -> None:
    manager = Manager()
    if before is not None:
        await SwarmStore(manager, "edge").write(before, None)
    claims = [Claim(holder=f"o{i}", term=2) for i in range(10)]
    assert sum(await asyncio.gather(*(SwarmStore(manager, "edge").write(claim, before) for claim in claims))) == 1


async def test_a_manager_that_does_not_answer_is_an_error_of_the_store() -> None:
    manager = Manager()
    manager.away = True
    for call in (SwarmStore(manager, "edge").read(), SwarmStore(manager, "edge").write(A, None)):
        with pytest.raises(OSError, match="no answer"):
            await call


async def test_a_label_that_nobody_can_read_is_no_claim() -> None:
    manager = Manager()
    await manager.create_config("edge-lease", {LABEL: "{"})
    assert await SwarmStore(manager, "edge").read() is None
    assert await SwarmStore(manager, "edge").write(A, None), "and is replaced"


async def test_it_is_a_lease() -> None:
    manager = Manager()
    first, second = (Lease(SwarmStore(manager, "edge"), name, lasts_s=60.0, beat_s=0.02) for name in ("a", "b"))
    await first.take()
    waiting = asyncio.ensure_future(second.take())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await first.release(over=False)
    await asyncio.wait_for(waiting, 10)
