from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import psutil

from orchestrator.runtimes.keeper import Keeper
from orchestrator.runtimes.processes import Processes
from orchestrator.runtimes.records import Records
from tests.orchestrator.runtimes.test_records import EXAMPLE
from tests.orchestrator.runtimes.world import LIMIT_S, NODES, SERVICE, Noticeboard, ProcessesKind, launch, pool, running


async def test_a_record_of_a_foreign_process_is_dropped_and_the_process_left_alone(tmp_path: Path) -> None:
    records = Records(tmp_path / "replicas")
    records.save(EXAMPLE.model_copy(update={"pid": os.getpid(), "create_time": psutil.Process().create_time()}))
    async with running(ProcessesKind(), tmp_path) as (after, _):
        assert after.replicas() == ()
        assert list(records.all()) == []
    assert psutil.pid_exists(os.getpid())


async def test_a_program_that_is_not_there_is_a_failure_like_another(tmp_path: Path) -> None:
    driver = Processes(models_dir=tmp_path, module="x", environment={}, python="/nonexistent")
    board = Noticeboard()
    kept = Keeper(
        driver=driver, state_dir=tmp_path, launches={"pool": launch()}, services={"pool": SERVICE}, nodes=NODES, routing=board
    )
    await kept.adopt()
    kept.apply(pool({"a": 1}))
    async with asyncio.timeout(LIMIT_S):
        while not kept.actions["run", "failed"]:
            await board.news.wait()
    assert kept.replicas() == ()
    await kept.stop_all()


def test_what_makes_a_process_outdated(tmp_path: Path) -> None:
    def driver(models: str = "models", module: str = "m") -> Processes:
        return Processes(models_dir=tmp_path / models, module=module, environment={})

    now = driver().specification(launch())
    assert driver().specification(launch(generation=3)) == now, "a restart that was asked for is told by its number"
    others = [
        driver(models="others").specification(launch()),
        driver(module="other").specification(launch()),
        driver().specification(launch("other")),
        driver().specification(replace(launch(), model_sha256="another export")),
        driver().specification(replace(launch(), memory_bytes=1)),
    ]
    assert now not in others
    assert len(set(others)) == len(others)
