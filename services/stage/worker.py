"""The stage's work on one process: a bounded queue, batches by the rule of `services.dataplane.batching`, results per task.

Light stages compute inline on the event loop, where an executor's 60-90 µs would be more than the work; ONNX sessions run in
as many threads as the quota has processors, one batch each.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from models.manifest import BATCH_AXIS, StageSpec
from services.dataplane.batching import DeadlineQueue, Waiting, batch_units, next_batch
from services.dataplane.errors import Expired, QueueFull, TaskError
from services.dataplane.service_time import ServiceEstimate
from services.dataplane.wire import Array
from services.stage import tensors
from services.stage.metrics import StageMetrics
from services.stage.processors import Processor


@dataclass(frozen=True, slots=True)
class Work:
    """A task as the worker sees it."""

    inputs: Mapping[str, Array]
    axes: Mapping[str, int]
    result: asyncio.Future[Result]


@dataclass(frozen=True, slots=True)
class Result:
    """What a task got and what it cost. Times in seconds."""

    outputs: Mapping[str, Array]
    queue_s: float
    compute_s: float
    batch: int
    """Items computed together."""


class Worker:
    """Computes tasks one batch at a time per slot. `start` and `stop` it inside the event loop."""

    def __init__(
        self,
        spec: StageSpec,
        processor: Processor,
        estimate: ServiceEstimate,
        metrics: StageMetrics,
        *,
        slots: int,
        capacity: int,
        max_batch: int,
    ) -> None:
        self.queue: DeadlineQueue[Work] = DeadlineQueue(capacity)
        self._spec = spec
        self._processor = processor
        self._estimate = estimate
        self._metrics = metrics
        self._slots = slots
        self._max_batch = max_batch
        self._executor = ThreadPoolExecutor(slots, thread_name_prefix=spec.name)
        self._arrival = asyncio.Event()
        self._ends: dict[int, float] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to take tasks from the queue."""
        if not self._processor.inline:
            self._tasks = [asyncio.ensure_future(self._serve(slot)) for slot in range(self._slots)]

    async def stop(self) -> None:
        """Stop taking tasks; a batch being computed is finished, whoever still waits is cancelled."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._executor.shutdown(wait=True, cancel_futures=True)

    def expected_wait_s(self, now: float) -> float:
        """Time [s] a task arriving now would wait: what is queued and what is left of the running batches, over the slots."""
        running = sum(max(end - now, 0.0) for end in self._ends.values())
        if not len(self.queue) and len(self._ends) < self._slots:
            return 0.0
        return (self.queue.backlog_s + running) / self._slots

    async def compute(self, inputs: Mapping[str, Array], axes: Mapping[str, int], due: float, enqueued: float) -> Result:
        """Compute one task.

        Args:
            inputs: checked inputs by name.
            axes: length of every symbolic axis.
            due: instant [s, monotonic] by which the result is of use.
            enqueued: when the task came [s, monotonic].

        Raises:
            QueueFull: the queue holds its capacity.
            Expired: the deadline has passed, or would have before the task was computed.
            TaskError: whatever else the processor says of the inputs.
        """
        lengths = tensors.symbolic_lengths(self._spec, axes)
        items = axes.get(BATCH_AXIS, 1)
        mean_s = self._estimate.mean_s(items * math.prod(lengths))
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiting = Waiting(Work(inputs, axes, result), due, items, lengths, enqueued, mean_s)
        if self._processor.inline:
            return self._inline(waiting)
        if self.queue.full:
            self._metrics.dropped("queue_full")
            raise QueueFull(
                f"the queue of stage {self._spec.name!r} is full ({self.queue.capacity} tasks)",
                retry_after_s=self.expected_wait_s(time.monotonic()),
            )
        self.queue.push(waiting)
        self._arrival.set()
        try:
            return await result
        finally:
            # Cancelled (the client left): out of the queue at once, before any work is spent on it.
            self.queue.remove(waiting)

    def _inline(self, waiting: Waiting[Work]) -> Result:
        start = time.monotonic()
        if start + self._estimate.tail_s(waiting.units) > waiting.due:
            if start < waiting.due:
                self._estimate.doubt()
            raise self._doomed(waiting, start)
        outputs = self._processor.run(waiting.task.inputs)
        seconds = time.monotonic() - start
        self._estimate.observe(waiting.units, seconds)
        return Result(outputs, start - waiting.enqueued, seconds, waiting.items)

    async def _serve(self, slot: int) -> None:
        while True:
            batch, doomed = next_batch(self.queue, time.monotonic(), self._estimate, self._max_batch)
            now = time.monotonic()
            for waiting in doomed:
                if not waiting.task.result.done():
                    waiting.task.result.set_exception(self._doomed(waiting, now))
            if batch:
                await self._run(slot, batch)
            elif not len(self.queue):
                self._arrival.clear()
                await self._arrival.wait()

    async def _run(self, slot: int, batch: list[Waiting[Work]]) -> None:
        loop = asyncio.get_running_loop()
        start = time.monotonic()
        units = batch_units(batch)
        self._ends[slot] = start + self._estimate.mean_s(units)
        try:
            outputs, seconds = await loop.run_in_executor(self._executor, self._compute, batch)
        except Exception as error:  # the batch's tasks are told; the worker goes on to the next batch
            for waiting in batch:
                if not waiting.task.result.done():
                    waiting.task.result.set_exception(error)
            return
        finally:
            del self._ends[slot]
        self._estimate.observe(units, seconds)
        items = sum(waiting.items for waiting in batch)
        self._metrics.batch_size.observe(items)
        for waiting, own in zip(batch, outputs, strict=True):
            if not waiting.task.result.done():
                waiting.task.result.set_result(Result(own, start - waiting.enqueued, seconds, items))

    def _compute(self, batch: list[Waiting[Work]]) -> tuple[list[dict[str, Array]], float]:
        start = time.monotonic()
        stacked = tensors.stack(self._spec.inputs, [waiting.task.inputs for waiting in batch])
        outputs = self._processor.run(stacked)
        own = tensors.unstack(self._spec.outputs, outputs, [waiting.task.axes for waiting in batch])
        return own, time.monotonic() - start

    def _doomed(self, waiting: Waiting[Work], now: float) -> TaskError:
        reason = "expired_in_queue" if now >= waiting.due else "would_expire"
        self._metrics.dropped(reason)
        what = "passed while it waited" if reason == "expired_in_queue" else "would pass before the work is done"
        return Expired(f"the deadline {what} at stage {self._spec.name!r}", reason=reason, elapsed_s=now - waiting.enqueued)
