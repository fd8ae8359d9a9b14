"""An open-loop run: everything drawn and encoded first, then sent on schedule whatever the server does.

Three parts. `plan` turns arrival processes and metadata into a schedule of encoded requests; nothing random and nothing costly
is left for the run. `Sender` holds that schedule: it never waits for an answer before the next send, and says how late it was.
What comes back is one record per task, in the order of the schedule, each with exactly one outcome.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loadgen.arrivals import ArrivalProcess, stream
from loadgen.client import Answer, Client, Metadata, NoAnswer, Reading, Request, read
from loadgen.corpus import payload
from loadgen.errors import RunFailed, SetupFailed, SpecError
from loadgen.outcome import Outcome, TaskRecord, classify

LEAD_S = 0.1
"""Between the end of the preparations and the first possible send."""

PATIENCE_FACTOR, PATIENCE_LEAST_S = 3.0, 5.0


def patience_s(deadline_s: float) -> float:
    """How long the generator waits for an answer [s], long after the deadline: a late answer is told from none at all."""
    return max(PATIENCE_FACTOR * deadline_s, PATIENCE_LEAST_S)


@dataclass(frozen=True, slots=True)
class Load:
    """The load on one pipeline."""

    metadata: Metadata
    arrivals: ArrivalProcess
    deadline_s: float


@dataclass(frozen=True, slots=True)
class ScheduledTask:
    """A task before it is sent; `scheduled_s` counts from the start of the measured part, the warm-up lies before 0."""

    pipeline: str
    index: int
    scheduled_s: float
    deadline_s: float
    patience_s: float
    """How long to wait for its answer, from the send."""
    request: Request


def plan(
    loads: Sequence[Load], client: Client, *, seed: int, duration_s: float, warmup_s: float, binary: bool
) -> list[ScheduledTask]:
    """The whole schedule, ascending, with every payload drawn and encoded.

    The warm-up sends the first `warmup_s` of each process, drawn from a stream of its own, before time 0: a step load then
    warms up on its first piece, and neither its length nor its presence changes what is measured.

    Costs about 1.3 kB and 0.1 ms a task, before the run; with an image or sound as much more as `loadgen.media` says.

    Raises:
        SetupFailed: a pipeline takes tensors that cannot be made.
    """
    tasks = [task for load in loads for task in _tasks(load, client, seed, duration_s, warmup_s, binary)]
    return sorted(tasks, key=lambda task: task.scheduled_s)


def _tasks(load: Load, client: Client, seed: int, duration_s: float, warmup_s: float, binary: bool) -> Iterator[ScheduledTask]:
    name = load.metadata.name
    measured = load.arrivals.times(stream(seed, name, "arrivals"), duration_s)
    warmup = load.arrivals.times(stream(seed, name, "warmup"), warmup_s) - warmup_s
    payloads = stream(seed, name, "payloads")
    # The measured part draws its payloads first, so that they do not depend on the warm-up.
    numbered = [*enumerate(measured), *enumerate(warmup, start=-len(warmup))]
    for index, scheduled_s in numbered:
        try:
            tensors = payload(load.metadata.inputs, payloads)
            request = client.encode(name, f"{name}-{index}", tensors, load.deadline_s, binary=binary)
        except SpecError as error:
            raise SetupFailed(f"pipeline {name!r}: {error}") from None
        yield ScheduledTask(name, index, float(scheduled_s), load.deadline_s, patience_s(load.deadline_s), request)


class Sender:
    """Holds one schedule against one server.

    `interrupt` may be called at any time, from a signal handler say: the schedule stops and every task without an answer
    becomes `cancelled`. A task that would be more than `max_in_flight` is not sent and counts as failed: a generator that
    waited for room would hide the server's backlog, one without a bound would die of it.
    """

    def __init__(self, client: Client, *, max_in_flight: int) -> None:
        self._client = client
        self._max_in_flight = max_in_flight
        self._in_flight: set[asyncio.Task[None]] = set()
        self._records: dict[int, TaskRecord] = {}
        self._origin = 0.0
        self._sending: asyncio.Task[None] | None = None
        self._fault: BaseException | None = None
        self.interrupted = False
        self.outcomes: Counter[Outcome] = Counter()
        """Of the tasks that have ended so far, warm-up included; for a progress display."""

    def interrupt(self) -> None:
        """End the run now."""
        self.interrupted = True
        for task in (self._sending, *self._in_flight):
            if task is not None:
                task.cancel()

    async def run(self, schedule: Sequence[ScheduledTask]) -> list[TaskRecord]:
        """Send everything, wait for everything that is out, and return one record per task in the order of the schedule.

        It ends at the latest one patience after the last send.

        Raises:
            RunFailed: the generator itself failed.
        """
        warmup_s = max(0.0, -schedule[0].scheduled_s) if schedule else 0.0
        with _quiet_memory():
            self._origin = time.monotonic() + LEAD_S + warmup_s
            self._sending = asyncio.create_task(self._send_all(schedule))
            await asyncio.wait({self._sending})
            if self._in_flight:
                await asyncio.wait(set(self._in_flight))
        if self._fault is None and not self._sending.cancelled():
            self._fault = self._sending.exception()
        if self._fault is not None:
            raise RunFailed(f"the generator failed while sending: {self._fault!r}") from self._fault
        return [self._records.get(i) or _unsent(task, None, given_up=True) for i, task in enumerate(schedule)]

    async def _send_all(self, schedule: Sequence[ScheduledTask]) -> None:
        for position, task in enumerate(schedule):
            await self._until(task.scheduled_s)
            if len(self._in_flight) >= self._max_in_flight:
                self._record(position, _unsent(task, "not_sent", given_up=False))
                continue
            sending = asyncio.create_task(self._send_one(position, task))
            self._in_flight.add(sending)
            sending.add_done_callback(self._settled)

    async def _until(self, scheduled_s: float) -> None:
        """Sleep until the time has come, never less.

        The event loop's timers have a resolution of 1 ms and may fire early by half of it: the loop below then asks again, so
        the last fraction is a few turns of the event loop instead of a late wake-up. Being late it returns at once, without
        giving up the turn, so that a backlog of sends goes out together.
        """
        while (wait_s := scheduled_s - self._now()) > 0:  # noqa: ASYNC110 - it waits for the clock, not for an event
            await asyncio.sleep(wait_s)

    async def _send_one(self, position: int, task: ScheduledTask) -> None:
        sent_s, finished_s = self._now(), None
        answer, given_up = None, False
        try:
            answer = await self._client.send(task.request, task.patience_s)
            finished_s = self._now()
            reading = read(answer, task.request.id)
        except NoAnswer as error:
            reading = Reading(problem=error.reason, reason=error.reason, detail=str(error))
        except asyncio.CancelledError:
            reading, given_up = Reading(reason="interrupted"), True
        self._record(position, _ended(task, sent_s, finished_s, answer, reading, given_up=given_up))

    def _settled(self, sending: asyncio.Task[None]) -> None:
        self._in_flight.discard(sending)
        if not sending.cancelled() and (fault := sending.exception()) is not None and self._fault is None:
            self._fault = fault
            self.interrupt()

    def _record(self, position: int, record: TaskRecord) -> None:
        self._records[position] = record
        self.outcomes[record.outcome] += 1

    def _now(self) -> float:
        return time.monotonic() - self._origin


def _ended(
    task: ScheduledTask, sent_s: float, finished_s: float | None, answer: Answer | None, reading: Reading, *, given_up: bool
) -> TaskRecord:
    status = None if answer is None else answer.status
    latency_s = None if finished_s is None else finished_s - task.scheduled_s
    return TaskRecord(
        pipeline=task.pipeline,
        index=task.index,
        scheduled_s=task.scheduled_s,
        sent_s=sent_s,
        finished_s=finished_s,
        deadline_s=task.deadline_s,
        status=status,
        reason=reading.reason,
        outcome=classify(status, latency_s, task.deadline_s, problem=reading.problem, given_up=given_up),
        hops=reading.hops,
        retry_after_s=reading.retry_after_s,
        detail=reading.detail,
    )


def _unsent(task: ScheduledTask, problem: str | None, *, given_up: bool) -> TaskRecord:
    return TaskRecord(
        pipeline=task.pipeline,
        index=task.index,
        scheduled_s=task.scheduled_s,
        sent_s=None,
        finished_s=None,
        deadline_s=task.deadline_s,
        status=None,
        reason="interrupted" if given_up else problem,
        outcome=classify(None, None, task.deadline_s, problem=problem, given_up=given_up),
    )


@contextmanager
def _quiet_memory() -> Iterator[None]:
    """No full garbage collection while tasks are out.

    The schedule is hundreds of thousands of objects; the collector would walk them all again and again, tens of milliseconds
    at a time, and each walk would show as send lag. So they are moved out of its sight, and the oldest generation, where the
    records pile up, is left alone until the end. Young objects are still collected, since HTTP exchanges leave cycles.
    """
    gc.collect()
    gc.freeze()
    thresholds = gc.get_threshold()
    gc.set_threshold(thresholds[0], thresholds[1], 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
