from __future__ import annotations

import asyncio
import contextlib

import pytest

from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.reach import Reach


@pytest.mark.parametrize(
    ("error", "problem"),
    [(Unreachable("the engine does not answer"), "does not answer"), (KeyError("Description"), "unforeseen: KeyError")],
)
async def test_a_watch_that_breaks_is_told_and_taken_up_again(error: Exception, problem: str) -> None:
    told, again, broken = [], asyncio.Event(), True

    async def connect() -> None:
        pass

    async def follow() -> None:
        nonlocal broken
        if broken:
            broken = False
            raise error
        told.append(reach.problem)
        reach.found()
        again.set()
        await asyncio.Event().wait()

    reach = Reach("the engine", connect)
    watching = asyncio.create_task(reach.watch(follow))
    await asyncio.wait_for(again.wait(), 10)
    assert problem in str(told[0])
    assert reach.problem is None
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
