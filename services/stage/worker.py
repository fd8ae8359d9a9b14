"""The stage's work on one process: a bounded queue, batches by the rule of `services.dataplane.batching`, results per task.

Light stages compute inline on the event loop, where the way to a thread and back would be more than the work; ONNX sessions
run in as many threads as the quota has processors, one batch each.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from models.manifest import BATCH_AXIS, StageSpec
from services.dataplane import batching
from services.dataplane.batching import DeadlineQueue, Waiting, batch_units, next_batch
from services.dataplane.deadline import Deadline
from services.dataplane.errors import Expired, QueueFull, TaskError, TooLarge
from services.dataplane.service_time import ServiceEstimate
from services.dataplane.wire import Array
from services.stage import tensors
from services.stage.metrics import StageMetrics
from services.stage.processors import Processor

ALONE_S = 0.02
"""Longest the event loop may be held by a batch, by its estimate. 0 for a processor that may wait for something."""
LONGEST_S = 10.0
"""Longest one request may hold a slot, by its estimate: nobody else is computed there meanwhile."""


@dataclass(frozen=True, slots=True)
class Work:
    """A task as the worker sees it."""

    inputs: Mapping[str, Array]
    axes: Mapping[str, int]
    result: asyncio.Future[Result]
    expires: float
    """Instant [s, monotonic] of the task's own deadline; `Waiting.due` is earlier by what the rest of the way needs."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a task got and what it cost. Times in seconds."""

    outputs: Mapping[str, Array]
    queue_s: float
    compute_s: float
    batch: int
    """Items computed together."""
    first_s: float | None = None
    """Of generated tokens: compute time until the first one."""


class Worker:
    """Computes tasks, one batch at a time per slot. Make it and use it inside the event loop; `stop` it at the end.

    Nothing polls: a task that comes while a slot is free goes to its thread at once, and a thread that is done takes the next
    batch.
    """

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
        alone_s: float = ALONE_S,
    ) -> None:
        self.queue: DeadlineQueue[Work] = DeadlineQueue(capacity)
        self._spec = spec
        self._processor = processor
        self._estimate = estimate
        self._metrics = metrics
        self._slots = slots
        self._max_batch = max_batch
        self._alone_s = alone_s
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(slots, thread_name_prefix=spec.name)
        self._ends: dict[int, float] = {}
        """Expected end of each running batch, by the identity of the batch."""
        self._stopped = False

    async def stop(self) -> None:
        """Take no more tasks; batches being computed are finished first."""
        self._stopped = True
        await asyncio.to_thread(self._executor.shutdown, wait=True)

    def expected_wait_s(self, now: float) -> float:
        """Time [s] a task arriving now would wait."""
        return batching.expected_wait_s(self.queue, self._ends.values(), self._slots, now)

    async def compute(
        self,
        inputs: Mapping[str, Array],
        axes: Mapping[str, int],
        until: Deadline,
        reserve_s: float = 0.0,
        *,
        alone: bool = False,
    ) -> Result:
        """Compute one task.

        Args:
            inputs: checked inputs by name.
            axes: length of every symbolic axis.
            until: the task's deadline here.
            reserve_s: time the rest of the way needs; the result is of use that much before the deadline.
            alone: nobody else is being served by this process.

        Raises:
            QueueFull: the queue holds its capacity.
            Expired: the deadline has passed, or would have before the task was computed.
            TaskError: whatever else the processor says of the inputs.
        """
        lengths = tensors.symbolic_lengths(self._spec, axes)
        items = axes.get(BATCH_AXIS, 1)
        mean_s = self._estimate.mean_s(items * math.prod(lengths))
        if mean_s > LONGEST_S:
            raise TooLarge(
                f"the request would hold stage {self._spec.name!r} for about {mean_s:.0f} s; the limit is {LONGEST_S:.0f} s: "
                "send less at once"
            )
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        work = Work(inputs, axes, result, until.due)
        waiting = Waiting(work, until.due - reserve_s, items, lengths, until.arrived, mean_s)
        # Alone, a short batch is computed where it is: the way to a thread and back costs up to half a millisecond, and whoever
        # comes meanwhile would have waited for the one slot anyway.
        if self._processor.inline or (alone and self._slots == 1 and not self._ends and mean_s <= self._alone_s):
            return self._inline(waiting)
        if self.queue.full:
            raise no_place(self._spec, self._metrics, self.queue, self.expected_wait_s(time.monotonic()))
        self.queue.push(waiting)
        self._dispatch()
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
        self._metrics.batch_size.observe(waiting.items)
        return Result(outputs, start - waiting.enqueued, seconds, waiting.items)

    def _dispatch(self) -> None:
        """Give every free slot the next batch."""
        while len(self._ends) < self._slots and len(self.queue) and not self._stopped:
            now = time.monotonic()
            batch, doomed = next_batch(self.queue, now, self._estimate, self._max_batch)
            for waiting in doomed:
                _settle(waiting, self._doomed(waiting, now))
            if batch:
                self._ends[id(batch)] = now + self._estimate.mean_s(batch_units(batch))
                self._executor.submit(self._run, batch, now)

    def _run(self, batch: list[Waiting[Work]], taken: float) -> None:
        """In a thread: compute a batch and hand the results to the event loop."""
        start = time.monotonic()
        outcomes: list[dict[str, Array] | Exception]
        try:
            outcomes = list(self._compute(batch))
        except Exception as error:  # the loop is told, whatever it was; the thread goes on to the next batch
            outcomes = [error] if len(batch) == 1 else [self._alone(waiting) for waiting in batch]
        seconds = time.monotonic() - start
        # The loop is closed only after `stop`, which waits for this thread.
        self._loop.call_soon_threadsafe(self._done, batch, taken, seconds, outcomes)

    def _alone(self, waiting: Waiting[Work]) -> dict[str, Array] | Exception:
        """A task of a batch that failed: whose fault it was shows when each is computed by itself."""
        try:
            return self._compute([waiting])[0]
        except Exception as error:
            return error

    def _compute(self, batch: list[Waiting[Work]]) -> list[dict[str, Array]]:
        stacked = tensors.stack(self._spec.inputs, [waiting.task.inputs for waiting in batch])
        outputs = self._processor.run(stacked)
        return tensors.unstack(self._spec.outputs, outputs, [waiting.task.axes for waiting in batch])

    def _done(
        self, batch: list[Waiting[Work]], taken: float, seconds: float, outcomes: list[dict[str, Array] | Exception]
    ) -> None:
        """In the loop: settle a batch's tasks, and take the next."""
        del self._ends[id(batch)]
        items = sum(waiting.items for waiting in batch)
        if not any(isinstance(outcome, Exception) for outcome in outcomes):
            self._estimate.observe(batch_units(batch), seconds)
            self._metrics.batch_size.observe(items)
        for waiting, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                _settle(waiting, outcome)
            else:
                _settle(waiting, Result(outcome, taken - waiting.enqueued, seconds, items))
        self._dispatch()

    def _doomed(self, waiting: Waiting[Work], now: float) -> TaskError:
        return past_saving(self._spec, self._metrics, waiting, waiting.task.expires, now)


def no_place(spec: StageSpec, metrics: StageMetrics, queue: DeadlineQueue[Any], wait_s: float) -> TaskError:
    """What a task is told that comes when the queue is full; counted."""
    metrics.dropped(QueueFull.reason)
    return QueueFull(f"the queue of stage {spec.name!r} is full ({queue.capacity} tasks)", retry_after_s=wait_s)


def past_saving(spec: StageSpec, metrics: StageMetrics, waiting: Waiting[Any], expires: float, now: float) -> TaskError:
    """What a task is told that is dropped before its work, whose own deadline is at `expires`; counted."""
    reason = "expired_in_queue" if now >= expires else "would_expire"
    metrics.dropped(reason)
    what = "passed while it waited" if reason == "expired_in_queue" else "would pass before the work is done"
    return Expired(f"the deadline {what} at stage {spec.name!r}", reason=reason, elapsed_s=now - waiting.enqueued)


def _settle(waiting: Waiting[Work], outcome: Result | Exception) -> None:
    """Tell a task how it went, unless it has gone away meanwhile."""
    result = waiting.task.result
    if result.done():
        return
    if isinstance(outcome, Exception):
        result.set_exception(outcome)
    else:
        result.set_result(outcome)
