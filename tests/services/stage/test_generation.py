"""The worker of a generating stage: whose fault an error is, what is counted, and what a waiting task is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.manifest import ServiceLaw
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, Expired, NoReplica, QueueFull, TooLarge
from services.dataplane.generation import GenerationEstimate
from services.dataplane.streams import Pace
from services.dataplane.wire import Array
from services.stage.generation import GenerationWorker, warm_up
from services.stage.metrics import StageMetrics
from tests.services import decoder, generative
from tests.services.generative import Paced
from tests.services.test_streams import until

LAW = ServiceLaw(base_s=0.001, per_unit_s=0.0, tail_ratio=1.0)


class Working:
    """A worker and what it works with."""

    def __init__(self, worker: GenerationWorker, graph: Paced, metrics: StageMetrics) -> None:
        self.worker, self.graph, self.metrics = worker, graph, metrics

    def ask(self, *prompt: int, tokens: int = 4, seconds: float = 20.0) -> asyncio.Task[list[int]]:
        return asyncio.ensure_future(self._ask(prompt, tokens, seconds))

    async def _ask(self, prompt: tuple[int, ...], tokens: int, seconds: float) -> list[int]:
        result = await self.worker.compute(inputs(prompt, tokens), {"batch": 1, "seq": len(prompt)}, due(seconds))
        return [int(token) for token in result.outputs["output_ids"][0]]

    def counted(self, name: str) -> float:
        for line in self.metrics.exposition().decode().splitlines():
            if line.startswith(f"espalier_stage_{name}{{"):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


def due(seconds: float = 20.0) -> Deadline:
    return Deadline(time.monotonic(), seconds)


def inputs(prompt: tuple[int, ...], tokens: int) -> dict[str, Array]:
    ids = np.array([prompt], dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "max_tokens": np.array([tokens])}


@asynccontextmanager
async def working(directory: Path, *, capacity: int = 4, max_batch: int = 2) -> AsyncIterator[Working]:
    _, processor, graph = generative.generator(directory, max_batch=max_batch)
    metrics = StageMetrics("generate", "local")
    estimate = GenerationEstimate(LAW, LAW)
    worker = GenerationWorker(processor, estimate, metrics, capacity=capacity, max_batch=max_batch)
    try:
        yield Working(worker, graph, metrics)
    finally:
        graph.free()
        await worker.stop()


async def test_a_task_gets_its_tokens_and_they_are_counted(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        assert await it.ask(3, 4, 5, tokens=6) == decoder.reference([3, 4, 5], 6)
        await until(lambda: it.counted("tokens_total") == 6)
        assert it.counted("prefill_duration_seconds_count") == 1
        assert it.counted("step_duration_seconds_count") == 5
        assert it.counted("batch_size_count") == 6


async def test_a_stream_is_told_of_each_token_and_an_end(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        it.graph.hold()
        states = it.worker.stream(inputs((3, 4, 5), 3), {"batch": 1, "seq": 3}, due(), 0.0, Pace(None, 20.0))
        seen = []
        async with aclosing(states):
            it.graph.allow()
            async for state in states:
                seen.append((state.outputs["output_count"][0], state.outputs["finish_reason"][0], state.first_s))
                it.graph.allow()
        assert [(count, reason) for count, reason, _ in seen] == [(1, b""), (2, b""), (3, b"length")]
        assert len({first_s for _, _, first_s in seen}) == 1


async def test_the_error_of_a_prompt_is_its_own(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        it.graph.hold()
        running = it.ask(3, 4, 5, tokens=8)
        it.graph.allow()
        await until(lambda: it.worker.expected_wait_s(time.monotonic()) == 0.0 and it.graph.runs == 1)
        it.graph.broken = 7  # prompts this long
        wrong = it.ask(*range(3, 10))
        it.graph.free()
        with pytest.raises(ZeroDivisionError):
            await wrong
        assert await running == decoder.reference([3, 4, 5], 8)
        with pytest.raises(BadRequest, match="outside the vocabulary"):
            await it.ask(99)


async def test_the_error_of_a_step_is_everybodys_and_the_next_ones_are_served(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        it.graph.hold()
        both = [it.ask(3, 4, 5, tokens=8), it.ask(6, 7, tokens=8)]
        it.graph.allow(2)
        await until(lambda: it.graph.runs == 2)
        it.graph.broken = 1  # steps
        it.graph.free()
        for task in both:
            with pytest.raises(ZeroDivisionError):
                await task
        it.graph.broken = 0
        assert await it.ask(3, 4, 5) == decoder.reference([3, 4, 5], 4)


async def test_a_full_queue_and_too_many_prompts_are_refused(tmp_path: Path) -> None:
    async with working(tmp_path, capacity=1, max_batch=1) as it:
        it.graph.hold()
        first = it.ask(3)
        assert await asyncio.to_thread(it.graph.waits.wait, 10)
        second = it.ask(4)
        await until(lambda: len(it.worker.queue) == 1)
        assert it.worker.expected_wait_s(time.monotonic()) > 0
        with pytest.raises(QueueFull) as full:
            await it.ask(5)
        assert full.value.retry_after_s is not None
        with pytest.raises(TooLarge, match="2 prompts in one request; stage 'generate' takes 1"):
            await it.worker.compute(inputs((3,), 1), {"batch": 2, "seq": 1}, due())
        it.graph.free()
        assert [await first, await second] == [decoder.reference([token], 4) for token in (3, 4)]


async def test_a_waiting_task_that_leaves_is_never_begun(tmp_path: Path) -> None:
    async with working(tmp_path, max_batch=1) as it:
        it.graph.hold()
        first = it.ask(3, tokens=2)
        assert await asyncio.to_thread(it.graph.waits.wait, 10)
        leaves = it.ask(4, 5, 6)
        await until(lambda: len(it.worker.queue) == 1)
        leaves.cancel()
        await until(lambda: len(it.worker.queue) == 0)
        it.graph.free()
        assert await first == decoder.reference([3], 2)
        assert it.graph.runs == 2


async def test_the_most_urgent_task_joins_first(tmp_path: Path) -> None:
    async with working(tmp_path, max_batch=1) as it:
        it.graph.hold()
        tasks = [it.ask(3, tokens=1)]
        assert await asyncio.to_thread(it.graph.waits.wait, 10)
        ended: list[int] = []
        for i, seconds in enumerate((18.0, 9.0, 14.0)):
            tasks.append(it.ask(4 + i, tokens=1, seconds=seconds))
            tasks[-1].add_done_callback(lambda _, i=i: ended.append(i))  # type: ignore[misc]
            await until(lambda: len(it.worker.queue) == len(tasks) - 1)
        it.graph.free()
        await asyncio.gather(*tasks)
        assert ended == [1, 2, 0]


async def test_answers_of_one_token_leave_nothing_behind(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        for token in (3, 4, 5):
            assert await it.ask(token, tokens=1) == decoder.reference([token], 1)
        await until(lambda: it.worker._members == ())


async def test_a_stream_holds_its_place_for_all_tokens_that_are_to_be_expected(tmp_path: Path) -> None:
    async with working(tmp_path, max_batch=1) as it:
        assert len(await it.ask(3, 4, 5, tokens=4)) == 4  # so that all that are allowed are to be expected
        it.graph.hold()
        states = it.worker.stream(inputs((3, 4, 5), 30), {"batch": 1, "seq": 3}, due(), 0.0, Pace(None, 20.0))
        async with aclosing(states):
            it.graph.allow()
            await anext(states)
            now = time.monotonic()
            assert it.worker.expected_wait_s(now) == pytest.approx(29 * it.worker._estimate.step.mean_s(1), rel=1e-6)


@pytest.mark.parametrize("whole", [False, True])
async def test_of_an_answer_wanted_whole_the_deadline_is_its_ends(tmp_path: Path, whole: bool) -> None:
    async with working(tmp_path) as it:
        it.graph.hold()
        states = it.worker.stream(inputs((3, 4, 5), 3), {"batch": 1, "seq": 3}, due(0.3), 0.0, Pace(None, 20.0, whole))
        async with aclosing(states):
            it.graph.allow()
            await anext(states)
            await asyncio.sleep(0.4)
            it.graph.free()
            if whole:
                with pytest.raises(Expired, match="while the answer was being made"):
                    [state async for state in states]
            else:
                assert [state async for state in states][-1].outputs["finish_reason"].tolist() == [b"length"]


async def test_whoever_is_still_there_when_it_stops_is_told(tmp_path: Path) -> None:
    async with working(tmp_path) as it:
        it.graph.hold()
        running = it.ask(3, tokens=9)
        assert await asyncio.to_thread(it.graph.waits.wait, 10)
        waits = it.ask(4, 5, tokens=9)
        await until(lambda: len(it.worker.queue) == 1)
        stopping = asyncio.ensure_future(it.worker.stop())
        await asyncio.sleep(0)
        it.graph.free()
        await stopping
        for task in (running, waits):
            with pytest.raises(NoReplica, match="stopping"):
                await task


@pytest.mark.parametrize("options", [{}, {"encoder": True}, {"image": True}])
def test_warming_up_knows_a_prefill_from_a_step(tmp_path: Path, options: dict[str, Any]) -> None:
    _, processor, _ = generative.generator(tmp_path, **options)
    estimate = warm_up(processor, {}, 4)
    assert estimate.mean_s(1, 8, 1, 1) > 0
    assert estimate.step.mean_s(4) > 0
