"""One request's way through a stage: decode, bind, queue and compute, then answer or forward to the next hop.

The same endpoint serves the gateway's itineraries and anybody's plain Open Inference Protocol request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.manifest import StageSpec
from services.dataplane import deadline, itinerary, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, Expired, NotFound, QueueFull, TaskError, UpstreamFailed
from services.dataplane.itinerary import Hop
from services.dataplane.wire import Limits, Message, Tensor
from services.forward import Call, Forwarder, passed_on
from services.hotpath import Answer, Request, content
from services.stage import tensors
from services.stage.metrics import StageMetrics
from services.stage.worker import Result, Worker

VERSION = "1"
DEFAULT_DEADLINE_S = 30.0
"""For a plain request that states none: long enough for a person with curl, short enough to be a limit."""
LONGEST_DEADLINE_S = 600.0


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
        worker: Worker,
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

    async def infer(self, request: Request) -> Answer:
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
            asyncio.get_running_loop().call_soon(self._metrics.ended, "ok")
            return answer
        finally:
            self.in_flight -= 1

    async def _answer(self, request: Request) -> Answer:
        headers = request.headers
        message = wire.decode_request(request.body, headers.get(wire.HEADER_LENGTH), self.limits)
        until = Deadline(
            request.arrived,
            deadline.read_budget_s(headers, message.parameters, default_s=DEFAULT_DEADLINE_S, maximum_s=LONGEST_DEADLINE_S),
        )
        if itinerary.PARAMETER not in message.parameters:
            return await self._plain(message, until)
        hops = itinerary.from_parameter(message.parameters[itinerary.PARAMETER])
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
        try:
            result = await self._compute(message, here.take, until, here.reserve_s)
        except TaskError as error:
            error.hops.insert(0, self._report(here, until, None))
            raise
        kept = self._keep(here, message, result)
        if len(hops) == 1:
            encoded, header_length = wire.encode_response(
                Message(kept, binary=True), model=self.identity.service, version=VERSION
            )
            report = self._report(here, until, result)
            return Answer(200, [*content(header_length), *itinerary.headers(report, None)], encoded)
        return await self._forward(here, hops[1:], kept, result, until, headers)

    async def _forward(
        self,
        here: Hop,
        rest: tuple[Hop, ...],
        kept: tuple[Tensor, ...],
        result: Result,
        until: Deadline,
        headers: Mapping[str, str],
    ) -> Answer:
        remaining_s = until.remaining_s(time.monotonic())
        if remaining_s <= 0:
            raise Expired(
                f"the deadline passed in stage {self.spec.name!r}", reason="expired", hops=[self._report(here, until, result)]
            )
        parameters = {itinerary.PARAMETER: itinerary.to_parameter(rest), deadline.PARAMETER: deadline.to_parameter(remaining_s)}
        body, header_length = wire.request_parts(Message(kept, parameters=parameters))
        call = Call(
            service=rest[0].service,
            candidates=rest[0].candidates,
            body=body,
            header_length=header_length,
            due=until.due,
            least_s=here.reserve_s,
            trace=passed_on(headers),
        )
        try:
            answer = await self._forwarder.post(call)
        except TaskError as error:
            if error.hops:
                error.hops[0]["transfer_s"] = itinerary.way_s(call.elapsed_s, error.hops[0].get("total_s", 0.0))
            error.hops.insert(0, self._report(here, until, result, call))
            raise
        further, length = answer.headers.get(itinerary.HEADER), answer.headers.get(wire.HEADER_LENGTH)
        if further is None or length is None:
            raise UpstreamFailed(f"service {call.service!r} answered nonsense: it is no stage of ours", stage=call.service)
        asyncio.get_running_loop().call_soon(self._count_way, call, answer.headers.get(itinerary.TOTAL_HEADER, "0"))
        reports = itinerary.headers(self._report(here, until, result, call), further)
        return Answer(200, [*content(int(length)), *reports], answer.body)

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
        if call is not None:
            report["call_s"] = round(call.elapsed_s, 6)
            if call.failed:
                report["failed"] = call.failed
        return report

    # --- common ---------------------------------------------------------------------------------------------------------

    async def _compute(self, message: Message, take: Mapping[str, str], until: Deadline, reserve_s: float) -> Result:
        inputs, axes = tensors.bind(self.spec, message, take)
        result = await self._worker.compute(inputs, axes, until, reserve_s, alone=self.in_flight == 1)
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
