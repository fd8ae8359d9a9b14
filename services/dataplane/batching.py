"""Which tasks a stage computes next: most urgent first, doomed ones dropped before any work, batches only where they pay.

Pure: the queue and the rule take the time as an argument. The stage's worker and the simulator call the same ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.dataplane.service_time import ServiceEstimate

T = TypeVar("T")

LOOK_AHEAD = 32
"""Queued tasks examined for a batch: enough to find some of like length, few enough to cost microseconds."""


@dataclass(slots=True, eq=False)
class Waiting(Generic[T]):
    """A task in a stage's queue."""

    task: T
    due: float
    """Instant [s] by which this stage must be done: the deadline less what the rest of the way needs."""
    items: int
    """Length of the batch axis."""
    lengths: tuple[int, ...]
    """Lengths of the other symbolic axes of the first input, in the manifest's order."""
    enqueued: float
    mean_s: float
    """Expected service time alone [s], as predicted when it was queued."""
    gone: bool = field(default=False)
    """Taken out of the queue: computed, dropped or cancelled."""

    @property
    def units(self) -> int:
        """Size alone [units]; see models.manifest.ServiceLaw."""
        return self.items * math.prod(self.lengths)


def batch_units(batch: Sequence[Waiting[T]]) -> int:
    """Size [units] of a batch padded to its longest member along every axis."""
    longest: list[int] = [max(lengths) for lengths in zip(*(waiting.lengths for waiting in batch), strict=True)]
    return sum(waiting.items for waiting in batch) * math.prod(longest)


class DeadlineQueue(Generic[T]):
    """A bounded queue, earliest deadline first; ties in order of arrival. Or all in order of arrival, to see what that costs.

    Invariant: `len` counts the tasks neither taken nor cancelled, and `backlog_s` is the sum of their `mean_s`. A cancelled
    task leaves at once by the count and later by the heap, which never holds more than twice the capacity; its first is never
    one that is out already, so that a task taken off the front leaves nothing of what it brought behind.
    """

    def __init__(self, capacity: int, *, urgent_first: bool = True) -> None:
        if capacity < 1:
            raise ValueError(f"a queue's capacity must be at least 1, not {capacity}")
        self.capacity = capacity
        self._urgent_first = urgent_first
        self.backlog_s = 0.0
        self._heap: list[tuple[float, int, Waiting[T]]] = []
        self._counter = itertools.count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def full(self) -> bool:
        """No room for another task."""
        return self._length >= self.capacity

    def push(self, waiting: Waiting[T]) -> None:
        """Queue a task.

        Raises:
            OverflowError: the queue is full; look at `full` first.
        """
        if self._length >= self.capacity:
            raise OverflowError(f"the queue already holds {self.capacity} tasks")
        if len(self._heap) >= 2 * self.capacity:
            self._heap = [entry for entry in self._heap if not entry[2].gone]
            heapq.heapify(self._heap)
        rank = waiting.due if self._urgent_first else 0.0
        heapq.heappush(self._heap, (rank, next(self._counter), waiting))
        self._length += 1
        self.backlog_s += waiting.mean_s

    def remove(self, waiting: Waiting[T]) -> None:
        """Take a task out, whoever it is; one that is out already stays out."""
        if not waiting.gone:
            waiting.gone = True
            self._length -= 1
            # The sum of many floats drifts; an empty queue is the moment to know it exactly.
            self.backlog_s = self.backlog_s - waiting.mean_s if self._length else 0.0
            while self._heap and self._heap[0][2].gone:
                heapq.heappop(self._heap)

    def take(self) -> Waiting[T] | None:
        """The first task, taken out; None where none is queued."""
        if not self._heap:
            return None
        waiting = self._heap[0][2]
        self.remove(waiting)
        return waiting

    def most_urgent(self, count: int) -> list[Waiting[T]]:
        """The first `count` tasks in the queue's order, left where they are."""
        # Cancelled ones may stand between: ask for as many more as there can be.
        excess = len(self._heap) - self._length
        return [entry[2] for entry in heapq.nsmallest(count + excess, self._heap) if not entry[2].gone][:count]


def next_batch(
    queue: DeadlineQueue[T], now: float, estimate: ServiceEstimate, max_items: int, *, shed: bool = True
) -> tuple[list[Waiting[T]], list[Waiting[T]]]:
    """Take the next batch out of the queue, and with it the tasks that are past saving.

    A task is doomed when even alone it would probably (95 % quantile) not be done in time: computing it would only make
    others late. The batch starts with the most urgent task that is not. Another joins while the batch, padded to its longest
    member, is still probably done before its most urgent member's instant, and costs no more than computing both apart.
    Without shedding a task past saving is computed like any other, and bounds no batch: it is late however it is computed.

    Returns:
        (batch, doomed). The batch is empty only when nothing computable is queued. Neither is in the queue any more.
    """
    doomed: list[Waiting[T]] = []
    while (first := queue.take()) is not None:
        in_time = now + estimate.tail_s(first.units) <= first.due
        if in_time or not shed:
            until = first.due if in_time else math.inf
            return [first, *_companions(queue, first, until, now, estimate, max_items)], doomed
        doomed.append(first)
        if now < first.due:
            estimate.doubt()
    return [], doomed


def _companions(
    queue: DeadlineQueue[T], first: Waiting[T], until: float, now: float, estimate: ServiceEstimate, max_items: int
) -> list[Waiting[T]]:
    if max_items <= first.items or not len(queue):
        return []
    chosen: list[Waiting[T]] = []
    items, lengths = first.items, first.lengths
    cost = estimate.mean_s(first.units)
    for other in queue.most_urgent(LOOK_AHEAD):
        joint_items = items + other.items
        joint_lengths = tuple(map(max, lengths, other.lengths))
        units = joint_items * math.prod(joint_lengths)
        joint_cost = estimate.mean_s(units)
        if (
            joint_items <= max_items
            and joint_cost <= cost + estimate.mean_s(other.units)
            and now + estimate.tail_s(units) <= until
        ):
            chosen.append(other)
            queue.remove(other)
            items, lengths, cost = joint_items, joint_lengths, joint_cost
    return chosen


def expected_wait_s(queue: DeadlineQueue[T], ends: Collection[float], slots: int, now: float) -> float:
    """Time [s] a task arriving now would wait: what is queued and what is left of the running batches, over the slots.

    Args:
        queue: of the stage.
        ends: expected end of each running batch [s].
        slots: batches computed at once.
        now: [s]
    """
    if not len(queue) and len(ends) < slots:
        return 0.0
    running = 0.0
    for end in ends:
        if end > now:
            running += end - now
    return (queue.backlog_s + running) / slots
