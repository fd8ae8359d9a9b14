"""The worker between queue and processor: where a batch is computed, and whose fault a failed one is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from models.manifest import ServiceLaw
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, TooLarge
from services.dataplane.service_time import ServiceEstimate
from services.dataplane.wire import Array
from services.stage.metrics import StageMetrics
from services.stage.worker import Worker
from tests.services import harness

LAW = ServiceLaw(base_s=0.001, per_unit_s=0.0, tail_ratio=1.0)


class Picky:
    """Doubles x, unless there is a negative number in the batch; remembers its threads and batches."""

    inline = False

    def __init__(self) -> None:
        self.threads: list[str] = []
        self.batches: list[list[float]] = []
        self.hold = threading.Event()
        self.held = threading.Event()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = [float(v) for v in inputs["x"]]
        self.threads.append(threading.current_thread().name)
        self.batches.append(values)
        if 0.0 in values:
            self.held.set()
            self.hold.wait(20)
        if min(values) < 0:
            raise BadRequest("negative")
        return {"y": inputs["x"] * 2}

    def describe(self) -> dict[str, Any]:
        return {}


@asynccontextmanager
async def working(processor: Picky, law: ServiceLaw = LAW, **options: Any) -> AsyncIterator[Worker]:
    spec = harness.spec(max_batch=8)
    estimate, metrics = ServiceEstimate(law), StageMetrics("double", "local")
    worker = Worker(spec, processor, estimate, metrics, slots=1, capacity=16, max_batch=8, **options)
    try:
        yield worker
    finally:
        processor.hold.set()
        await worker.stop()


async def compute(worker: Worker, *values: float, alone: bool = False) -> list[float]:
    until = Deadline(asyncio.get_running_loop().time(), 20.0)
    inputs = {"x": np.array(values, dtype=np.float32)}
    result = await worker.compute(inputs, {"batch": len(values)}, until, alone=alone)
    return [float(v) for v in result.outputs["y"]]


async def test_alone_a_short_batch_is_computed_in_the_loop_and_otherwise_in_a_thread() -> None:
    picky = Picky()
    async with working(picky) as worker:
        assert await compute(worker, 1.0, alone=True) == [2.0]
        assert await compute(worker, 2.0, alone=False) == [4.0]
    assert picky.threads[0] == threading.main_thread().name
    assert picky.threads[1].startswith("double")


async def test_a_long_batch_never_holds_the_loop() -> None:
    picky = Picky()
    async with working(picky, LAW.model_copy(update={"base_s": 0.5})) as worker:
        assert await compute(worker, 1.0, alone=True) == [2.0]
    assert picky.threads[0] != threading.main_thread().name


async def test_in_a_batch_that_fails_only_the_guilty_task_fails() -> None:
    picky = Picky()
    async with working(picky) as worker:
        first = asyncio.ensure_future(compute(worker, 0.0))
        await asyncio.to_thread(picky.held.wait)
        others = [asyncio.ensure_future(compute(worker, value)) for value in (1.0, -1.0, 3.0)]
        await asyncio.sleep(0)
        assert len(worker.queue) == 3
        picky.hold.set()
        assert await first == [0.0]
        assert await others[0] == [2.0]
        with pytest.raises(BadRequest, match="negative"):
            await others[1]
        assert await others[2] == [6.0]
    assert picky.batches == [[0.0], [1.0, -1.0, 3.0], [1.0], [-1.0], [3.0]]


async def test_a_request_that_would_hold_the_stage_for_long_is_refused() -> None:
    async with working(Picky(), LAW.model_copy(update={"per_unit_s": 4.0})) as worker:
        with pytest.raises(TooLarge, match="about 12 s; the limit is 10 s"):
            await compute(worker, 1.0, 2.0, 3.0)
