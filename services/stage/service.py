"""One request's way through a stage: decode, bind, queue and compute, then answer or forward to the next hop.

The same endpoint serves the gateway's itineraries and anybody's plain Open Inference Protocol request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping

from models.manifest import StageSpec
from services.dataplane import deadline, itinerary, streams, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, InternalFailure, NotFound, QueueFull, TaskError
from services.dataplane.itinerary import Further
from services.dataplane.streams import Pace
from services.dataplane.wire import Limits, Message
from services.forward import Forwarder
from services.hotpath import Answer, Request, Stream, content
from services.stage import tensors
from services.stage.generation import GenerationWorker
from services.stage.metrics import StageMetrics
from services.stage.onward import VERSION, AnyWorker, Identity, Onward, Visit
from services.stage.processors.generate_part import PARAMETER as SESSION
from services.stage.streaming import Streaming
from services.stage.worker import Result, Worker

log = logging.getLogger(__name__)

DEFAULT_DEADLINE_S = 30.0
"""For a plain request that states none: long enough for a person with curl, short enough to be a limit."""
LONGEST_DEADLINE_S = 600.0


class StageService:
    """The data plane of one replica."""

    def __init__(
        self,
        spec: StageSpec,
        identity: Identity,
        worker: AnyWorker,
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
        self._metrics = metrics
        self._onward = Onward(spec, identity, worker, forwarder, metrics)
        self._streaming = Streaming(spec, worker, forwarder, self._onward, metrics, self._compute_hop)
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
        here, *rest = itinerary.from_parameter(message.parameters[itinerary.PARAMETER])
        visit = Visit(message, here, tuple(rest), until, headers)
        pace = Pace.from_parameter(message.parameters.get(streams.PARAMETER))
        return await self._walk(visit) if pace is None else await self._streaming.begin(visit, pace)

    # --- a plain request ------------------------------------------------------------------------------------------------

    async def _plain(self, message: Message, until: Deadline) -> Answer:
        take = {tensor.name: tensor.name for tensor in self.spec.inputs}
        wanted = self._wanted(message)
        self._refuse_unknown(message)
        result = await self._compute(message, take, until, 0.0)
        answer = Message(
            tensors=tuple(self._onward.tensor(name, name, result) for name in wanted), id=message.id, binary=message.binary
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

    async def _walk(self, visit: Visit) -> Answer:
        body, length, reports = await self._onward.send(visit, await self._compute_hop(visit))
        return Answer(200, [*content(length), *reports], body)

    async def _compute_hop(self, visit: Visit) -> Result:
        here = visit.here
        try:
            return await self._compute(visit.message, here.take, visit.until, here.reserve_s, here.parts)
        except TaskError as error:
            error.hops.insert(0, self._onward.report(visit, None))
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

    def _check_path(self, parameters: Mapping[str, str]) -> None:
        if parameters["model"] != self.identity.service:
            raise NotFound(f"no model {parameters['model']!r} here; this stage serves {self.identity.service!r}")
        if parameters.get("version", VERSION) != VERSION:
            raise NotFound(f"model {self.identity.service!r} has no version {parameters['version']!r}, only {VERSION}")
