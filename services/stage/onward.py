"""What becomes of a result at a stage: what is kept of the tensors, where they go next, and what is reported of the visit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from models.manifest import StageSpec
from services.dataplane import deadline, itinerary, streams, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, Expired, TaskError, UpstreamFailed
from services.dataplane.itinerary import Hop
from services.dataplane.streams import Pace
from services.dataplane.wire import Message, Tensor
from services.forward import Call, Forwarder, passed_on
from services.stage.generation import GenerationWorker
from services.stage.metrics import StageMetrics
from services.stage.parts import PartWorker
from services.stage.processors.generate_part import PARAMETER as SESSION
from services.stage.worker import Result, Worker

VERSION = "1"

AnyWorker = Worker | GenerationWorker | PartWorker
Reports = list[tuple[bytes, bytes]]
"""Headers that tell what hops measured."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this replica is, as reports and metrics name it."""

    service: str
    replica: str
    node: str


class Visit(NamedTuple):
    """A request with an itinerary, of which this stage is the first hop."""

    message: Message
    here: Hop
    rest: tuple[Hop, ...]
    until: Deadline
    headers: Mapping[str, str]


class Onward:
    """Answers and forwards for one replica."""

    def __init__(
        self, spec: StageSpec, identity: Identity, worker: AnyWorker, forwarder: Forwarder, metrics: StageMetrics
    ) -> None:
        self._datatypes = {tensor.name: tensor.datatype for tensor in spec.outputs}
        self._stage = spec.name
        self._identity = identity
        self._worker = worker
        self._forwarder = forwarder
        self._metrics = metrics

    async def send(self, visit: Visit, result: Result) -> tuple[bytes, int | None, Reports]:
        """What the chain makes of a result: the body, the length of its JSON part, and what all hops from here on measured.

        Raises:
            TaskError: what a later hop said, or Expired where there is no time left for it.
        """
        kept = self._kept(visit, result)
        if not visit.rest:
            whole = Message(kept, binary=True)
            encoded, header_length = wire.encode_response(whole, model=self._identity.service, version=VERSION)
            return encoded, header_length, itinerary.headers(self.report(visit, result), None)
        if visit.until.remaining_s(time.monotonic()) <= 0:
            hops = [self.report(visit, result)]
            raise Expired(f"the deadline passed in stage {self._stage!r}", reason="expired", hops=hops)
        call = self._call(visit, kept)
        try:
            answer = await self._forwarder.post(call)
        except TaskError as error:
            self.put_before(error, visit, result, call)
            raise
        length = answer.headers.get(wire.HEADER_LENGTH)
        if length is None or itinerary.HEADER not in answer.headers:
            raise UpstreamFailed.nonsense(call.service, "it is no stage of ours")
        self.count_way(call, answer.headers)
        return answer.body, int(length), self.reports(visit, result, call, answer.headers)

    def call(self, visit: Visit, result: Result, pace: Pace) -> Call:
        """The call to the next hop with a result, which is to be answered in frames."""
        return self._call(visit, self._kept(visit, result), pace)

    def _call(self, visit: Visit, kept: tuple[Tensor, ...], pace: Pace | None = None) -> Call:
        following = visit.rest[0]
        parameters: dict[str, Any] = {
            itinerary.PARAMETER: itinerary.to_parameter(visit.rest),
            deadline.PARAMETER: deadline.to_parameter(visit.until.remaining_s(time.monotonic())),
        }
        if pace is not None:
            parameters[streams.PARAMETER] = pace.to_parameter()
        if (session := visit.message.parameters.get(SESSION)) is not None:
            parameters[SESSION] = session  # a pass of a cut decoder, of which the next hop is a part too
        body, header_length = wire.request_parts(Message(kept, parameters=parameters))
        return Call(
            service=following.service,
            candidates=following.candidates,
            body=body,
            header_length=header_length,
            due=visit.until.due,
            least_s=visit.here.reserve_s,
            trace=passed_on(visit.headers),
        )

    def _kept(self, visit: Visit, result: Result) -> tuple[Tensor, ...]:
        made = {f"{visit.here.step}.{name}": name for name in self._datatypes}
        kept = []
        for ref in visit.here.keep:
            if ref in made:
                kept.append(self.tensor(ref, made[ref], result))
            elif (passed := visit.message.tensor(ref)) is not None:
                kept.append(passed)
            else:
                raise BadRequest(f"the itinerary wants {ref!r} kept, which neither came nor was made here")
        return tuple(kept)

    def tensor(self, name: str, output: str, result: Result) -> Tensor:
        """One of the stage's outputs, under any name."""
        return Tensor(name, self._datatypes[output], result.outputs[output])

    # --- reports --------------------------------------------------------------------------------------------------------

    def report(self, visit: Visit, result: Result | None, call: Call | None = None) -> dict[str, Any]:
        """What this hop measured, for the gateway's routing and the task's time line. Times in seconds."""
        now = time.monotonic()
        report: dict[str, Any] = {
            "step": visit.here.step,
            "service": self._identity.service,
            "replica": self._identity.replica,
            "node": self._identity.node,
            "wait_s": round(self._worker.expected_wait_s(now), 6),
            "queue_length": len(self._worker.queue),
            "total_s": round(now - visit.until.arrived, 6),
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

    def reports(self, visit: Visit, result: Result, call: Call, headers: Mapping[str, str]) -> Reports:
        """This hop's report before those that a call was answered with."""
        return itinerary.headers(self.report(visit, result, call), headers.get(itinerary.HEADER))

    def put_before(self, error: TaskError, visit: Visit, result: Result, call: Call) -> None:
        """This hop's report before those of the hop that failed."""
        if error.hops:
            error.hops[0]["transfer_s"] = itinerary.way_s(call.elapsed_s, error.hops[0].get("total_s", 0.0))
        error.hops.insert(0, self.report(visit, result, call))

    def count_way(self, call: Call, headers: Mapping[str, str]) -> None:
        """Count, at the loop's next turn, the time of a call that the stage it went to did not see."""
        asyncio.get_running_loop().call_soon(self._count_way, call, headers.get(itinerary.TOTAL_HEADER, "0"))

    def _count_way(self, call: Call, total_s: str) -> None:
        with contextlib.suppress(ValueError):
            self._metrics.transfer.observe(itinerary.way_s(call.elapsed_s, float(total_s)))
