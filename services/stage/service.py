"""One request's way through a stage: decode, bind, queue and compute, then answer or forward to the next hop.

The same endpoint serves the gateway's itineraries and anybody's plain Open Inference Protocol request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from models.manifest import StageSpec
from services.dataplane import deadline, itinerary, streams, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, Expired, InternalFailure, NotFound, QueueFull, TaskError, UpstreamFailed
from services.dataplane.itinerary import Further, Hop
from services.dataplane.streams import Pace
from services.dataplane.wire import Limits, Message, Tensor
from services.forward import Call, Forwarder, passed_on
from services.hotpath import Answer, Request, Stream, content
from services.stage import tensors
from services.stage.generation import GenerationWorker
from services.stage.metrics import StageMetrics
from services.stage.parts import PartWorker
from services.stage.processors.generate_part import PARAMETER as SESSION
from services.stage.worker import Result, Worker
from services.transport import StreamedAnswer

log = logging.getLogger(__name__)

VERSION = "1"
DEFAULT_DEADLINE_S = 30.0
"""For a plain request that states none: long enough for a person with curl, short enough to be a limit."""
LONGEST_DEADLINE_S = 600.0

Reports = list[tuple[bytes, bytes]]
"""Headers that tell what hops measured."""

_STREAM_TYPE = (b"content-type", streams.MEDIA_TYPE.encode())


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this replica is, as reports and metrics name it."""

    service: str
    replica: str
    node: str


class StageService:
    """The data plane of one replica."""

    def __init__(
        self,
        spec: StageSpec,
        identity: Identity,
        worker: Worker | GenerationWorker | PartWorker,
        forwarder: Forwarder,
        metrics: StageMetrics,
        *,
        limits: Limits,
        max_in_flight: int,
    ) -> None:
        self.spec = spec
        self.identity = identity
        self.draining = False
        self.in_flight = 0
        self._worker = worker
        self._forwarder = forwarder
        self._metrics = metrics
        self.limits = limits
        self._max_in_flight = max_in_flight

    async def infer(self, request: Request) -> Answer | Stream:
        """Serve one request; see `services.hotpath.Endpoint`."""
        self._check_path(request.parameters)
        if self.in_flight >= self._max_in_flight:
            self._metrics.dropped("queue_full")
            raise QueueFull(f"stage {self.spec.name!r} holds {self.in_flight} requests already", retry_after_s=1.0)
        self.in_flight += 1
        try:
            answer = await self._answer(request)
        except TaskError as error:
            self._metrics.ended(error.reason)
            error.stage = error.stage or self.identity.service
            raise
        except asyncio.CancelledError:
            self._metrics.ended("cancelled")
            raise
        except Exception:
            self._metrics.ended("internal")
            raise
        else:
            if isinstance(answer, Stream):
                return answer._replace(pieces=self._held(answer.pieces))
            asyncio.get_running_loop().call_soon(self._metrics.ended, "ok")
            return answer
        finally:
            self.in_flight -= 1

    async def _held(self, pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        """A streamed answer to its end: in flight as long as it lasts, counted once, and what fails is told in it."""
        self.in_flight += 1
        outcome = "cancelled"
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    yield piece
            outcome = "ok"
        except TaskError as error:
            outcome = error.reason
            error.stage = error.stage or self.identity.service
            yield streams.error(error)
        except Exception as error:  # as in `hotpath.Endpoint`
            outcome = InternalFailure.reason
            log.error("a streamed request failed", exc_info=error)
            failure = InternalFailure.of(error)
            failure.stage = self.identity.service
            yield streams.error(failure)
        finally:
            self.in_flight -= 1
            self._metrics.ended(outcome)

    async def _answer(self, request: Request) -> Answer | Stream:
        headers = request.headers
        message = wire.decode_request(request.body, headers.get(wire.HEADER_LENGTH), self.limits)
        until = Deadline(
            request.arrived,
            deadline.read_budget_s(headers, message.parameters, default_s=DEFAULT_DEADLINE_S, maximum_s=LONGEST_DEADLINE_S),
        )
        if itinerary.PARAMETER not in message.parameters:
            return await self._plain(message, until)
        hops = itinerary.from_parameter(message.parameters[itinerary.PARAMETER])
        pace = Pace.from_parameter(message.parameters.get(streams.PARAMETER))
        if pace is not None:
            return await self._stream(message, hops, until, headers, pace)
        return await self._walk(message, hops, until, headers)

    # --- a plain request ------------------------------------------------------------------------------------------------

    async def _plain(self, message: Message, until: Deadline) -> Answer:
        take = {tensor.name: tensor.name for tensor in self.spec.inputs}
        wanted = self._wanted(message)
        self._refuse_unknown(message)
        result = await self._compute(message, take, until, 0.0)
        answer = Message(
            tensors=tuple(self._tensor(name, name, result) for name in wanted), id=message.id, binary=message.binary
        )
        encoded, header_length = wire.encode_response(answer, model=self.identity.service, version=VERSION)
        timing = f"q;dur={result.queue_s * 1e3:.3f}, c;dur={result.compute_s * 1e3:.3f}".encode()
        return Answer(200, [*content(header_length), (b"server-timing", timing)], encoded)

    def _wanted(self, message: Message) -> tuple[str, ...]:
        names = tuple(tensor.name for tensor in self.spec.outputs)
        for name in message.outputs or ():
            if name not in names:
                raise BadRequest(f"stage {self.spec.name!r} has no output {name!r}; it has {', '.join(names)}")
        return message.outputs or names

    def _refuse_unknown(self, message: Message) -> None:
        names = [tensor.name for tensor in self.spec.inputs]
        for tensor in message.tensors:
            if tensor.name not in names:
                raise BadRequest(f"stage {self.spec.name!r} has no input {tensor.name!r}; it takes {', '.join(names)}")

    # --- a hop of an itinerary ------------------------------------------------------------------------------------------

    async def _walk(self, message: Message, hops: tuple[Hop, ...], until: Deadline, headers: Mapping[str, str]) -> Answer:
        here = hops[0]
        result = await self._compute_hop(message, here, until)
        kept = self._keep(here, message, result)
        if len(hops) == 1:
            encoded, header_length = wire.encode_response(
                Message(kept, binary=True), model=self.identity.service, version=VERSION
            )
            report = self._report(here, until, result)
            return Answer(200, [*content(header_length), *itinerary.headers(report, None)], encoded)
        body, length, reports = await self._forward(
            here, hops[1:], kept, result, until, headers, message.parameters.get(SESSION)
        )
        return Answer(200, [*content(length), *reports], body)

    async def _forward(
        self,
        here: Hop,
        rest: tuple[Hop, ...],
        kept: tuple[Tensor, ...],
        result: Result,
        until: Deadline,
        headers: Mapping[str, str],
        session: Any = None,
    ) -> tuple[bytes, int, Reports]:
        """What the next hop answered: body, length of its JSON part, and what all hops from here on measured."""
        remaining_s = until.remaining_s(time.monotonic())
        if remaining_s <= 0:
            raise Expired(
                f"the deadline passed in stage {self.spec.name!r}", reason="expired", hops=[self._report(here, until, result)]
            )
        call = self._call(here, rest, kept, until, headers, session=session)
        try:
            answer = await self._forwarder.post(call)
        except TaskError as error:
            self._put_before(error, here, until, result, call)
            raise
        further, length = answer.headers.get(itinerary.HEADER), answer.headers.get(wire.HEADER_LENGTH)
        if further is None or length is None:
            raise UpstreamFailed(f"service {call.service!r} answered nonsense: it is no stage of ours", stage=call.service)
        asyncio.get_running_loop().call_soon(self._count_way, call, answer.headers.get(itinerary.TOTAL_HEADER, "0"))
        return answer.body, int(length), itinerary.headers(self._report(here, until, result, call), further)

    def _call(
        self,
        here: Hop,
        rest: tuple[Hop, ...],
        kept: tuple[Tensor, ...],
        until: Deadline,
        headers: Mapping[str, str],
        pace: Pace | None = None,
        session: Any = None,
    ) -> Call:
        """The call to the next hop; with a pace, its answer is to come in frames. A decoder's session goes along."""
        parameters: dict[str, Any] = {
            itinerary.PARAMETER: itinerary.to_parameter(rest),
            deadline.PARAMETER: deadline.to_parameter(until.remaining_s(time.monotonic())),
        }
        if pace is not None:
            parameters[streams.PARAMETER] = pace.to_parameter()
        if session is not None:
            parameters[SESSION] = session
        body, header_length = wire.request_parts(Message(kept, parameters=parameters))
        return Call(
            service=rest[0].service,
            candidates=rest[0].candidates,
            body=body,
            header_length=header_length,
            due=until.due,
            least_s=here.reserve_s,
            trace=passed_on(headers),
        )

    def _put_before(self, error: TaskError, here: Hop, until: Deadline, result: Result, call: Call) -> None:
        """This hop's report before those of the hop that failed."""
        if error.hops:
            error.hops[0]["transfer_s"] = itinerary.way_s(call.elapsed_s, error.hops[0].get("total_s", 0.0))
        error.hops.insert(0, self._report(here, until, result, call))

    # --- a hop of an itinerary whose answer is streamed -----------------------------------------------------------------

    async def _stream(
        self, message: Message, hops: tuple[Hop, ...], until: Deadline, headers: Mapping[str, str], pace: Pace
    ) -> Stream:
        """Begin to answer in frames: the generating stage makes them, every stage before it passes them on.

        Where no stage generates (or one that does is fused with others), the last one makes a single frame.

        Whatever goes wrong before the first frame is raised, and becomes an ordinary error.
        """
        if isinstance(self._worker, GenerationWorker):
            made = self._made(self._worker, message, hops, until, headers, pace)
            frame, reports = await anext(made)
            return Stream(200, [_STREAM_TYPE, *reports], _after(frame, made))
        here, rest = hops[0], hops[1:]
        result = await self._compute_hop(message, here, until)
        kept = self._keep(here, message, result)
        if not rest:
            return self._at_once(here, kept, result, until)
        call = self._call(here, rest, kept, until, headers, pace)
        try:
            answer = await self._forwarder.open(call)
        except TaskError as error:
            self._put_before(error, here, until, result, call)
            raise
        asyncio.get_running_loop().call_soon(self._count_way, call, answer.headers.get(itinerary.TOTAL_HEADER, "0"))
        reports = itinerary.headers(self._report(here, until, result, call), answer.headers.get(itinerary.HEADER))
        return Stream(200, [_STREAM_TYPE, *reports], self._relayed(here, until, result, call, answer, pace))

    def _at_once(self, here: Hop, kept: tuple[Tensor, ...], result: Result, until: Deadline) -> Stream:
        """The end of a chain in which nobody generates: a stream of one frame."""
        encoded, header_length = wire.encode_response(Message(kept, binary=True), model=self.identity.service, version=VERSION)
        report = self._report(here, until, result)

        async def pieces() -> AsyncGenerator[bytes]:
            yield streams.answer(encoded, header_length) + streams.end(report)

        return Stream(200, [_STREAM_TYPE, *itinerary.headers(report, None)], pieces())

    async def _relayed(
        self, here: Hop, until: Deadline, result: Result, call: Call, answer: StreamedAnswer, pace: Pace
    ) -> AsyncGenerator[bytes]:
        """Frames as they come, each at once and unread."""
        try:
            async with contextlib.aclosing(self._forwarder.frames(call, answer, pace.stall_s)) as frames:
                async for frame in frames:
                    yield frame.raw
        except TaskError as error:
            error.hops.insert(0, self._report(here, until, result, call))
            raise

    async def _made(
        self,
        worker: GenerationWorker,
        message: Message,
        hops: tuple[Hop, ...],
        until: Deadline,
        headers: Mapping[str, str],
        pace: Pace,
    ) -> AsyncGenerator[tuple[bytes, Reports]]:
        """Frames, each with the reports of its hops: what has been made so far, walked through the rest of the itinerary.

        One walk at a time: tokens that are made meanwhile go with the next one. So a slow hop, or a client that reads slowly,
        gets fewer and longer pieces, and nothing piles up.
        """
        here, rest = hops[0], hops[1:]
        result: Result | None = None
        due = until
        try:
            inputs, axes = tensors.bind(self.spec, message, here.take)
            async with contextlib.aclosing(worker.stream(inputs, axes, until, here.reserve_s, pace, here.parts)) as states:
                async for result in states:
                    yield await self._frame(message, here, rest, due, headers, result)
                    if not pace.whole:
                        # From here on only the next token has a deadline.
                        due = Deadline(until.arrived, time.monotonic() - until.arrived + pace.stall_s)
        except TaskError as error:
            if not error.hops:
                error.hops.insert(0, self._report(here, until, result))
            raise
        if result is not None:
            self._metrics.computed(result.queue_s, result.compute_s)
        yield streams.end(self._report(here, until, result)), []

    async def _frame(
        self,
        message: Message,
        here: Hop,
        rest: tuple[Hop, ...],
        until: Deadline,
        headers: Mapping[str, str],
        result: Result,
    ) -> tuple[bytes, Reports]:
        kept = self._keep(here, message, result)
        if not rest:
            encoded, header_length = wire.encode_response(
                Message(kept, binary=True), model=self.identity.service, version=VERSION
            )
            return streams.answer(encoded, header_length), itinerary.headers(self._report(here, until, result), None)
        body, length, reports = await self._forward(here, rest, kept, result, until, headers)
        return streams.answer(body, length), reports

    def _count_way(self, call: Call, total_s: str) -> None:
        """Count the time of a call that the stage it went to did not see."""
        with contextlib.suppress(ValueError):
            self._metrics.transfer.observe(itinerary.way_s(call.elapsed_s, float(total_s)))

    def _keep(self, here: Hop, message: Message, result: Result) -> tuple[Tensor, ...]:
        made = {f"{here.step}.{spec.name}": spec.name for spec in self.spec.outputs}
        kept = []
        for ref in here.keep:
            if ref in made:
                kept.append(self._tensor(ref, made[ref], result))
            elif (passed := message.tensor(ref)) is not None:
                kept.append(passed)
            else:
                raise BadRequest(f"the itinerary wants {ref!r} kept, which neither came nor was made here")
        return tuple(kept)

    def _report(self, hop: Hop, until: Deadline, result: Result | None, call: Call | None = None) -> dict[str, Any]:
        """What this hop measured, for the gateway's routing and the task's time line. Times in seconds."""
        now = time.monotonic()
        report: dict[str, Any] = {
            "step": hop.step,
            "service": self.identity.service,
            "replica": self.identity.replica,
            "node": self.identity.node,
            "wait_s": round(self._worker.expected_wait_s(now), 6),
            "queue_length": len(self._worker.queue),
            "total_s": round(now - until.arrived, 6),
        }
        if result is not None:
            report |= {"queue_s": round(result.queue_s, 6), "compute_s": round(result.compute_s, 6), "batch": result.batch}
            if result.first_s is not None:
                report["first_s"] = round(result.first_s, 6)
        if call is not None:
            report["call_s"] = round(call.elapsed_s, 6)
            if call.failed:
                report["failed"] = call.failed
        return report

    async def _compute_hop(self, message: Message, here: Hop, until: Deadline) -> Result:
        try:
            return await self._compute(message, here.take, until, here.reserve_s, here.parts)
        except TaskError as error:
            error.hops.insert(0, self._report(here, until, None))
            raise

    # --- common ---------------------------------------------------------------------------------------------------------

    async def _compute(
        self,
        message: Message,
        take: Mapping[str, str],
        until: Deadline,
        reserve_s: float,
        parts: tuple[Further, ...] = (),
    ) -> Result:
        inputs, axes = tensors.bind(self.spec, message, take)
        worker = self._worker
        if isinstance(worker, Worker):
            result = await worker.compute(inputs, axes, until, reserve_s, alone=self.in_flight == 1)
        elif isinstance(worker, GenerationWorker):
            result = await worker.compute(inputs, axes, until, reserve_s, parts)
        else:
            result = await worker.compute(inputs, until, message.parameters.get(SESSION))
        # Counted at the loop's next turn: by then the answer or the next hop's request is on its way.
        asyncio.get_running_loop().call_soon(self._metrics.computed, result.queue_s, result.compute_s)
        return result

    def _tensor(self, name: str, output: str, result: Result) -> Tensor:
        datatype = next(spec.datatype for spec in self.spec.outputs if spec.name == output)
        return Tensor(name, datatype, result.outputs[output])

    def _check_path(self, parameters: Mapping[str, str]) -> None:
        if parameters["model"] != self.identity.service:
            raise NotFound(f"no model {parameters['model']!r} here; this stage serves {self.identity.service!r}")
        if parameters.get("version", VERSION) != VERSION:
            raise NotFound(f"model {self.identity.service!r} has no version {parameters['version']!r}, only {VERSION}")


async def _after(first: bytes, made: AsyncGenerator[tuple[bytes, Reports]]) -> AsyncGenerator[bytes]:
    """The first frame, and all that come after it."""
    async with contextlib.aclosing(made):
        yield first
        async for frame, _ in made:
            yield frame
