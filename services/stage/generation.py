"""The worker of a stage that makes tokens: one running batch, which tasks join and leave between two steps.

The loop runs in a thread of its own, since a step takes milliseconds and the next must follow at once. It reads the queue under
a lock held for microseconds; what it made crosses to the event loop by `call_soon_threadsafe`. A task whose client has left is
marked gone, and the loop drops it before the next step. The rules are `services.dataplane.generation`'s.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from models.manifest import BATCH_AXIS, ServiceLaw
from services.dataplane import batching
from services.dataplane.batching import DeadlineQueue, Waiting
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, Expired, NoReplica, TooLarge
from services.dataplane.generation import GenerationEstimate, Member, next_to_join
from services.dataplane.itinerary import Further
from services.dataplane.streams import Pace
from services.dataplane.wire import Array
from services.stage.metrics import StageMetrics
from services.stage.parts import Rest
from services.stage.processors.generate import Batch, Generate, Pass, Row
from services.stage.warm import usual_s
from services.stage.worker import Result, no_place, past_saving

_WARM_LENGTHS = (8, 64)
_WARM_RUNS = 3
_STOPPING = "the stage is stopping"


@dataclass(slots=True, eq=False)
class _Task:
    """A task. The thread writes rows and the instants; the event loop reads them, and writes `gone`."""

    rows: list[Row]
    until: Deadline
    due: float
    """Instant [s, monotonic] at which the whole answer, or a stream's first token, must be there."""
    pace: Pace | None
    """Of a stream, which hears of every token; None of an answer that hears of its end."""
    further: tuple[Further, ...] = ()
    """Where the further parts of a cut decoder may be found."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set in the event loop: a token for a stream, or the end."""
    error: Exception | None = None
    gone: bool = False
    """The client has left."""
    taken: float = math.inf
    first: float = math.inf
    last: float = math.inf
    """When it joined the batch, when its first and its newest token came [s, monotonic]."""
    batch: int = 0
    """Sequences in the batch it joined."""

    @property
    def whole(self) -> bool:
        """Whether the deadline is the whole answer's."""
        return self.pace is None or self.pace.whole

    @property
    def tokens(self) -> int:
        """See `services.dataplane.generation.Asks`."""
        return max(row.max_tokens for row in self.rows) if self.whole else 1

    @property
    def finished(self) -> bool:
        """Whether its last token has been made."""
        return all(row.finish for row in self.rows)

    @property
    def going_on(self) -> int:
        """Sequences that are not finished."""
        return sum(not row.finish for row in self.rows)

    def left(self, estimate: GenerationEstimate) -> float:
        """Steps to expect until it leaves the batch, at least 1."""
        return max(1.0, *(estimate.tokens(row.max_tokens) - len(row.tokens) for row in self.rows))

    def member(self, estimate: GenerationEstimate) -> Member:
        """The task as the rule for joining sees it."""
        if self.pace is None or self.pace.whole:
            return Member(self.due, self.going_on, self.left(estimate))
        return Member(math.inf if self.pace.token_s is None else self.last + self.pace.token_s, self.going_on, 1.0)


class GenerationWorker:
    """As `services.stage.worker.Worker` for a processor that generates. Make it and use it in the event loop; `stop` it."""

    def __init__(
        self,
        processor: Generate,
        estimate: GenerationEstimate,
        metrics: StageMetrics,
        *,
        capacity: int,
        max_batch: int,
        rest: Rest | None = None,
    ) -> None:
        """Begin with an empty batch.

        Args:
            processor: does the steps.
            estimate: of prefill and step.
            metrics: of the stage.
            capacity: tasks that may wait.
            max_batch: most sequences in the batch.
            rest: asks the further parts, where the processor is only the first of several.
        """
        self.queue: DeadlineQueue[_Task] = DeadlineQueue(capacity)
        self._processor = processor
        self._estimate = estimate
        self._metrics = metrics
        self._max_batch = max_batch
        self._members: tuple[_Task, ...] = ()
        """In the batch; replaced as a whole by the thread."""
        self._rest = rest
        self._chosen: tuple[Further, ...] = ()
        """The replicas of further parts that the running batch keeps to."""
        self._stopped = False
        self._wake = threading.Condition()
        self._loop = asyncio.get_running_loop()
        if rest is not None:
            processor.rest = self._ask
        self._thread = threading.Thread(target=self._run, name=processor.spec.name, daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Take no more tasks and end after the step that is being made."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def expected_wait_s(self, now: float) -> float:
        """Time [s] a task arriving now would wait until it joins."""
        step_s = self._estimate.step.mean_s(self._max_batch)
        ends: list[float] = []
        for task in self._members:
            # Of a stream too all that is left: its place is not free before.
            ends += [now + task.left(self._estimate) * step_s] * task.going_on
        return batching.expected_wait_s(self.queue, ends, self._max_batch, now)

    async def compute(
        self,
        inputs: Mapping[str, Array],
        axes: Mapping[str, int],
        until: Deadline,
        reserve_s: float = 0.0,
        further: tuple[Further, ...] = (),
    ) -> Result:
        """The whole answer of one task; arguments and errors are those of `Worker.compute`, and of `stream`."""
        task, waiting = self._push(inputs, axes, until, reserve_s, further, None)
        try:
            await task.changed.wait()
            return self._result(task)
        finally:
            self._leave(task, waiting)

    async def stream(
        self,
        inputs: Mapping[str, Array],
        axes: Mapping[str, int],
        until: Deadline,
        reserve_s: float,
        pace: Pace,
        further: tuple[Further, ...] = (),
    ) -> AsyncGenerator[Result]:
        """The answer of one task as far as it has come, again whenever there is more; the last one is whole.

        Args:
            inputs: checked inputs by name.
            axes: length of every symbolic axis.
            until: the deadline, of what the pace says.
            reserve_s: time the rest of the way needs.
            pace: how fast tokens must come.
            further: where the further parts of a cut decoder may be found, in order.

        Raises:
            TaskError: as `compute`; also after the first token.
        """
        task, waiting = self._push(inputs, axes, until, reserve_s, further, pace)
        try:
            while True:
                await task.changed.wait()
                task.changed.clear()
                result = self._result(task)
                yield result
                if all(result.outputs["finish_reason"]):
                    return
        finally:
            self._leave(task, waiting)

    # --- in the event loop ----------------------------------------------------------------------------------------------

    def _push(
        self,
        inputs: Mapping[str, Array],
        axes: Mapping[str, int],
        until: Deadline,
        reserve_s: float,
        further: tuple[Further, ...],
        pace: Pace | None,
    ) -> tuple[_Task, Waiting[_Task]]:
        items = axes.get(BATCH_AXIS, 1)
        if items > self._max_batch:
            raise TooLarge(f"{items} prompts in one request; stage {self._processor.spec.name!r} takes {self._max_batch}")
        if len(further) != self._processor.parts - 1:
            raise BadRequest(
                f"stage {self._processor.spec.name!r} is a part of a decoder cut into {self._processor.parts}; "
                "its other parts are found by a pipeline only"
            )
        task = _Task(self._processor.rows(inputs), until, until.due - reserve_s, pace, further)
        length = max(len(row.prompt) for row in task.rows)
        with self._wake:
            if self._stopped:
                raise NoReplica(_STOPPING)
            if self.queue.full:
                raise no_place(self._processor.spec, self._metrics, self.queue, self.expected_wait_s(time.monotonic()))
            allowed = max(row.max_tokens for row in task.rows)
            mean_s = self._estimate.mean_s(items, length, allowed, self._max_batch)
            waiting = Waiting(task, task.due, items, (length,), until.arrived, mean_s)
            self.queue.push(waiting)
            self._wake.notify()
        return task, waiting

    def _leave(self, task: _Task, waiting: Waiting[_Task]) -> None:
        """Out of the queue at once, out of the batch before its next step."""
        task.gone = True
        with self._wake:
            self.queue.remove(waiting)

    def _result(self, task: _Task) -> Result:
        if task.error is not None:
            raise task.error
        # The reason is read before the tokens: the thread sets it after the last one.
        finish = [row.finish for row in task.rows]
        outputs = self._processor.outputs([list(row.tokens) for row in task.rows], finish)
        return Result(
            outputs, task.taken - task.until.arrived, task.last - task.taken, task.batch, first_s=task.first - task.taken
        )

    def _tell(self, tasks: Sequence[_Task], count: Callable[[], None]) -> None:
        """From the thread: these tasks have news."""
        self._loop.call_soon_threadsafe(self._told, tasks, count)

    @staticmethod
    def _told(tasks: Sequence[_Task], count: Callable[[], None]) -> None:
        for task in tasks:
            task.changed.set()
        count()

    # --- in the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        batch: Batch | None = None
        while True:
            with self._wake:
                while not (self._stopped or len(self.queue) or batch is not None):
                    self._wake.wait()
                if self._stopped:
                    break
            try:
                batch = self._cleared(self._joined(batch))
                if batch is not None:
                    batch = self._cleared(self._stepped(batch))
            except Exception as error:  # told to every task of the batch, whatever it was; the loop goes on with the next ones
                self._failed(self._members, error)
                batch, self._members = None, ()
        with self._wake:
            waiting = self.queue.most_urgent(len(self.queue))
        self._failed([*self._members, *(each.task for each in waiting)], NoReplica(_STOPPING))

    def _cleared(self, batch: Batch | None) -> Batch | None:
        """The batch without those who have left, are done, or whose deadline for a whole answer has passed."""
        now = time.monotonic()
        expired = [task for task in self._members if task.whole and now > task.until.due]
        self._failed(expired, Expired("the deadline passed while the answer was being made", reason="expired"))
        self._members = tuple(t for t in self._members if not (t.gone or t.finished or t.error is not None))
        if batch is None:
            return None
        stay = {id(row) for task in self._members for row in task.rows if not row.finish}
        return self._processor.without(batch, [row for row in batch.rows if id(row) not in stay])

    def _joined(self, batch: Batch | None) -> Batch | None:
        """The batch with everybody who may join now. Each reads its prompt by itself: batching that gains nothing on a CPU."""
        while not self._stopped:
            now = time.monotonic()
            members = [task.member(self._estimate) for task in self._members if task.going_on]
            with self._wake:
                if members and not self._stays(self.queue.most_urgent(1)):
                    return batch
                joining, doomed = next_to_join(self.queue, members, now, self._estimate, self._max_batch)
            for waiting in doomed:
                expires = waiting.task.until.due
                self._failed([waiting.task], past_saving(self._processor.spec, self._metrics, waiting, expires, now))
            if joining is None:
                return batch
            task = joining.task
            task.taken = now
            task.batch = sum(member.rows for member in members) + joining.items
            if not members and self._rest is not None:
                self._chosen = self._rest.choose(task.further, now)
            try:
                fresh = self._processor.prefill(task.rows)
            except Exception as error:  # this task's alone
                self._failed([task], error)
                continue
            task.first = task.last = time.monotonic()
            self._estimate.prefill.observe(joining.units, task.first - now)
            self._members = (*self._members, task)
            self._progress([task], self._metrics.prefill.observe, task.first - now, len(task.rows))
            left = self._processor.without(fresh, [row for row in fresh.rows if row.finish])
            if left is not None:
                batch = left if batch is None else self._processor.joined([batch, left])
        return batch

    def _stays(self, urgent: Sequence[Waiting[_Task]]) -> bool:
        """Whether the running batch's replicas of further parts may serve the next task too; if not, it waits for the end."""
        further = urgent[0].task.further if urgent else self._chosen
        return all(set(mine.candidates) <= set(theirs.candidates) for mine, theirs in zip(self._chosen, further, strict=True))

    def _ask(self, step: Pass) -> Array:
        """Called by the processor in this thread: logits from the further parts."""
        if self._rest is None:
            raise RuntimeError("there are no further parts")
        others = tuple(row.name for task in self._members for row in task.rows if not row.finish and row.name not in step.rows)
        return asyncio.run_coroutine_threadsafe(self._rest.proceed(step, self._chosen, others), self._loop).result()

    def _stepped(self, batch: Batch) -> Batch:
        start = time.monotonic()
        count = len(batch)
        batch = self._processor.step(batch)
        end = time.monotonic()
        self._estimate.step.observe(count, end - start)
        # Those whose last token came before this step made none now.
        stepped = {id(row) for row in batch.rows}
        news = [task for task in self._members if any(id(row) in stepped for row in task.rows)]
        for task in news:
            task.last = end
        self._progress(news, self._metrics.step.observe, end - start, count)
        return batch

    def _progress(self, tasks: Sequence[_Task], observe: Callable[[float], None], seconds: float, tokens: int) -> None:
        done = [task for task in tasks if task.finished]
        for row in (row for task in done for row in task.rows):
            self._estimate.answered(len(row.tokens), row.max_tokens)
        self._tell(
            [task for task in tasks if task.pace is not None or task.finished], lambda: self._count(observe, seconds, tokens)
        )

    def _count(self, observe: Callable[[float], None], seconds: float, tokens: int) -> None:
        observe(seconds)
        self._metrics.tokens.inc(tokens)
        self._metrics.batch_size.observe(tokens)

    def _failed(self, tasks: Sequence[_Task], error: Exception) -> None:
        """Tell those of the tasks that are not done."""
        failed = [task for task in tasks if not task.finished]
        for task in failed:
            task.error = error
        if failed:
            self._tell(failed, lambda: None)


def warm_up(processor: Generate, typical_length: Mapping[str, int], max_batch: int) -> GenerationEstimate:
    """Read made-up prompts and make tokens until the times mean something, and fit a law to prefill and to step."""

    def read(length: int, count: int = 1) -> Batch:
        return processor.prefill([processor.made_up(length, typical_length) for _ in range(count)])

    prefills, steps = [], []
    for length in _WARM_LENGTHS:
        usual = usual_s(partial(read, length), _WARM_RUNS)
        prefills.append((float(len(processor.made_up(length, typical_length).prompt)), usual, usual))
    for count in sorted({1, max_batch}):
        usual = usual_s(partial(processor.step, read(_WARM_LENGTHS[0], count)), _WARM_RUNS)
        steps.append((float(count), usual, usual))
    return GenerationEstimate(ServiceLaw.fit(prefills), ServiceLaw.fit(steps))
