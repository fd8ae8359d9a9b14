"""A hop whose answer is streamed: the generating stage makes frames, every stage before it passes them on.

What is streamed is whole answers as far as they have come (`services.dataplane.streams`), so the stages behind the generating
one see ordinary requests. Whatever goes wrong before the first frame is raised, and becomes an ordinary error.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from models.manifest import StageSpec
from services.dataplane import streams
from services.dataplane.deadline import Deadline
from services.dataplane.errors import TaskError
from services.dataplane.streams import Pace
from services.forward import Call, Forwarder
from services.hotpath import Stream
from services.stage import tensors
from services.stage.generation import GenerationWorker
from services.stage.metrics import StageMetrics
from services.stage.onward import AnyWorker, Onward, Reports, Visit
from services.stage.worker import Result
from services.transport import StreamedAnswer

_TYPE = (b"content-type", streams.MEDIA_TYPE.encode())


class Streaming:
    """Streamed answers of one replica."""

    def __init__(
        self,
        spec: StageSpec,
        worker: AnyWorker,
        forwarder: Forwarder,
        onward: Onward,
        metrics: StageMetrics,
        compute: Callable[[Visit], Awaitable[Result]],
    ) -> None:
        """Put the pieces together; `compute` makes the result of a hop that does not generate."""
        self._spec = spec
        self._worker = worker
        self._forwarder = forwarder
        self._onward = onward
        self._metrics = metrics
        self._compute = compute

    async def begin(self, visit: Visit, pace: Pace) -> Stream:
        """Begin to answer in frames. Where no stage generates (or one that does is fused with others), the last makes one."""
        if isinstance(self._worker, GenerationWorker):
            made = self._made(self._worker, visit, pace)
            frame, reports = await anext(made)
            return Stream(200, [_TYPE, *reports], _after(frame, made))
        result = await self._compute(visit)
        if not visit.rest:
            body, length, reports = await self._onward.send(visit, result)
            frame = streams.answer(body, length) + streams.end(self._onward.report(visit, result))
            return Stream(200, [_TYPE, *reports], _once(frame))
        call = self._onward.call(visit, result, pace)
        try:
            answer = await self._forwarder.open(call)
        except TaskError as error:
            self._onward.put_before(error, visit, result, call)
            raise
        self._onward.count_way(call, answer.headers)
        reports = self._onward.reports(visit, result, call, answer.headers)
        return Stream(200, [_TYPE, *reports], self._relayed(visit, result, call, answer, pace))

    async def _relayed(
        self, visit: Visit, result: Result, call: Call, answer: StreamedAnswer, pace: Pace
    ) -> AsyncGenerator[bytes]:
        """Frames as they come, each at once and unread."""
        try:
            async with contextlib.aclosing(self._forwarder.frames(call, answer, pace.stall_s)) as frames:
                async for frame in frames:
                    yield frame.raw
        except TaskError as error:
            error.hops.insert(0, self._onward.report(visit, result, call))
            raise

    async def _made(self, worker: GenerationWorker, visit: Visit, pace: Pace) -> AsyncGenerator[tuple[bytes, Reports]]:
        """Frames, each with the reports of its hops: what has been made so far, walked through the rest of the itinerary.

        One walk at a time: tokens that are made meanwhile go with the next one. So a slow hop, or a client that reads slowly,
        gets fewer and longer pieces, and nothing piles up.
        """
        here, until = visit.here, visit.until
        result: Result | None = None
        now = visit
        try:
            inputs, axes = tensors.bind(self._spec, visit.message, here.take)
            states = worker.stream(inputs, axes, until, here.reserve_s, pace, here.parts)
            async with contextlib.aclosing(states):
                async for result in states:
                    body, length, reports = await self._onward.send(now, result)
                    yield streams.answer(body, length), reports
                    if not pace.whole:
                        # From here on only the next token has a deadline.
                        now = visit._replace(until=Deadline(until.arrived, time.monotonic() - until.arrived + pace.stall_s))
        except TaskError as error:
            if not error.hops:
                error.hops.insert(0, self._onward.report(visit, result))
            raise
        finally:
            # Also of an answer that was ended early: so long it had its place.
            if result is not None:
                self._metrics.computed(result.queue_s, result.compute_s)
        yield streams.end(self._onward.report(visit, result)), []


async def _once(frame: bytes) -> AsyncGenerator[bytes]:
    yield frame


async def _after(first: bytes, made: AsyncGenerator[tuple[bytes, Reports]]) -> AsyncGenerator[bytes]:
    """The first frame, and all that come after it."""
    async with contextlib.aclosing(made):
        yield first
        async for frame, _ in made:
            yield frame
