"""A decoder cut into parts, between the stages that hold them: the first part's calls to the others, and a worker for those.

Every pass of the first part's running batch goes once through the other parts, as an ordinary request with an itinerary, and
comes back as logits. Only hidden states travel; keys and values stay where they are made. So a running batch stays with one
replica of each part, and ends with it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from models.manifest import StageSpec
from services.dataplane import deadline, itinerary, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import TaskError, UpstreamFailed
from services.dataplane.itinerary import Further, Hop
from services.dataplane.service_time import ServiceEstimate
from services.dataplane.wire import Array, Limits, Message, Tensor
from services.forward import Call, Forwarder
from services.stage.metrics import StageMetrics
from services.stage.processors import generate_part
from services.stage.processors.generate import Pass
from services.stage.processors.generate_part import IDLE_S, Part, Session
from services.stage.worker import Result

PASS_S = 10.0
"""Longest time [s] of one pass through the other parts."""
_HIDDEN, _LOGITS, _MASK, _PLACES = "hidden", "logits", "attention_mask", "position_ids"


class Rest:
    """The other parts of a decoder, as its first part sees them. Use it in the event loop."""

    def __init__(self, forwarder: Forwarder, limits: Limits) -> None:
        self._forwarder = forwarder
        self._limits = limits
        self._batch = secrets.token_hex(8)

    def choose(self, further: Sequence[Further], now: float) -> tuple[Further, ...]:
        """One living replica of each part: the first that this process has not just found dead."""
        book = self._forwarder.book
        return tuple(
            Further(part.service, tuple(sorted(part.candidates, key=lambda each: book.ejected(each.replica, now)))[:1])
            for part in further
        )

    async def proceed(self, step: Pass, chosen: Sequence[Further], others: tuple[int, ...]) -> Array:
        """Logits (batch, vocabulary) of the last position.

        Args:
            step: the pass.
            chosen: the replicas of the other parts.
            others: names of the sequences in the running batch that are not in this pass.

        Raises:
            TaskError: a part could not be reached, no longer has the sequences, or answered nonsense.
        """
        hops = _hops(chosen)
        session = Session(self._batch, step.rows, step.past, others)
        parameters = {
            itinerary.PARAMETER: itinerary.to_parameter(hops),
            deadline.PARAMETER: deadline.to_parameter(PASS_S),
            generate_part.PARAMETER: session.to_parameter(),
        }
        tensors = (
            Tensor(_HIDDEN, "FP32", step.hidden),
            Tensor(_MASK, "INT64", step.attention_mask),
            Tensor(_PLACES, "INT64", step.position_ids),
        )
        body, length = wire.request_parts(Message(tensors, parameters=parameters))
        call = Call(hops[0].service, hops[0].candidates, body, length, due=time.monotonic() + PASS_S)
        answer = await self._forwarder.post(call)
        try:
            message = wire.decode_response(answer.body, answer.headers.get(wire.HEADER_LENGTH), self._limits)
            (logits,) = message.tensors
        except (TaskError, ValueError) as error:
            raise UpstreamFailed.nonsense(call.service, error) from None
        return logits.array


def _hops(chosen: Sequence[Further]) -> tuple[Hop, ...]:
    source, hops = _HIDDEN, []
    for i, part in enumerate(chosen):
        last = i == len(chosen) - 1
        made = f"{part.service}.{_LOGITS if last else _HIDDEN}"
        take = {_HIDDEN: source, _MASK: _MASK, _PLACES: _PLACES}
        hops.append(Hop(part.service, part.service, part.candidates, take, (made,) if last else (made, _MASK, _PLACES), 0.0))
        source = made
    return tuple(hops)


class PartWorker:
    """As `services.stage.worker.Worker` for a further part: one pass after another, in the order in which they come.

    Nothing is put together from several requests: a running batch is one already. Make it and use it in the event loop.
    """

    def __init__(self, spec: StageSpec, processor: Part, estimate: ServiceEstimate, metrics: StageMetrics) -> None:
        self.queue: list[float] = []
        """Expected service times of those that wait, and of the one being computed [s]."""
        self._spec = spec
        self._processor = processor
        self._estimate = estimate
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=spec.name)
        self._watch = self._loop.call_later(IDLE_S / 2, self._forget)

    async def stop(self) -> None:
        """Take no more; what is being computed is finished first."""
        self._watch.cancel()
        await asyncio.to_thread(self._executor.shutdown, wait=True)

    def expected_wait_s(self, now: float) -> float:
        """Time [s] a pass that arrives now would wait."""
        del now
        return sum(self.queue)

    async def compute(self, inputs: Mapping[str, Array], until: Deadline, session: Any) -> Result:
        """One pass of the sequences that the request's parameter names; errors are those of `Part.proceed`."""
        asked = Session.from_parameter(session)
        rows, new = inputs[_HIDDEN].shape[:2]
        mean_s = self._estimate.mean_s(rows * new)
        self.queue.append(mean_s)
        try:
            outputs, start, seconds = await self._loop.run_in_executor(self._executor, self._proceed, inputs, asked)
        finally:
            self.queue.remove(mean_s)
        self._estimate.observe(rows * new, seconds)
        self._metrics.batch_size.observe(rows)
        return Result(outputs, start - until.arrived, seconds, rows)

    def _proceed(self, inputs: Mapping[str, Array], session: Session) -> tuple[dict[str, Array], float, float]:
        start = time.monotonic()
        outputs = self._processor.proceed(inputs, session, start)
        return outputs, start, time.monotonic() - start

    def _forget(self) -> None:
        self._watch = self._loop.call_later(IDLE_S / 2, self._forget)
        self._executor.submit(self._processor.forget, time.monotonic())
