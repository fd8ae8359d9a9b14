"""The call to the next hop, by gateway and stage alike: the best candidate, then at most one other, within the budget left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import orjson

from services.dataplane import errors, itinerary, streams
from services.dataplane.errors import Expired, NoReplica, UpstreamFailed
from services.dataplane.itinerary import Candidate
from services.dataplane.routing import RetryBudget, RouteBook
from services.dataplane.streams import Frame
from services.dataplane.wire import HEADER_LENGTH, Part
from services.transport import HttpAnswer, StreamedAnswer, TimedOut, Transport, Unreachable

A = TypeVar("A", HttpAnswer, HttpAnswer | StreamedAnswer)

TRACE_HEADERS = ("traceparent", "tracestate", "x-request-id")
"""Passed on by every hop, whether or not anybody traces."""
RETRY_STATUSES = frozenset({429, 503})
"""Refusals by the callee itself, before any work: another replica may well have room."""


def passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Of a request's headers those that the next hop gets too."""
    return {name: headers[name] for name in TRACE_HEADERS if name in headers}


@dataclass(slots=True)
class Call:
    """One call to one service: what is sent, to whom it may go, and what came of it."""

    service: str
    candidates: Sequence[Candidate]
    body: Sequence[Part]
    header_length: int | None
    due: float
    """Instant [s, monotonic] after which no answer is of use."""
    least_s: float = 0.0
    """Time [s] an answer needs at best: with less left there is no second try."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """Headers passed on unchanged: traceparent, tracestate, x-request-id."""
    failed: list[str] = field(default_factory=list)
    """Replicas found dead on the way."""
    replica: str = ""
    """The replica asked last."""
    elapsed_s: float = 0.0
    """Duration of the last attempt [s]."""


class Forwarder:
    """Calls other stages for one process, with its own view of who is alive and its own retry budget."""

    def __init__(self, transport: Transport, book: RouteBook, retries: RetryBudget) -> None:
        self.book = book
        self._transport = transport
        self._retries = retries

    async def post(self, call: Call) -> HttpAnswer:
        """The answer of the first candidate that gives one, with status 200.

        Raises:
            TaskError: what the stage answered, Expired when time ran out, or UpstreamFailed when nobody could be reached.
        """
        return await self._asked(call, self._transport.post)

    async def open(self, call: Call) -> StreamedAnswer:
        """As `post`, for an answer in frames: it has begun. Read it with `frames`, which closes it."""
        answer = await self._asked(call, self._transport.stream)
        if isinstance(answer, StreamedAnswer):
            if answer.headers.get("content-type") == streams.MEDIA_TYPE:
                return answer
            answer.close()
        raise UpstreamFailed.nonsense(call.service, "it does not stream")

    async def frames(self, call: Call, answer: StreamedAnswer, stall_s: float) -> AsyncGenerator[Frame]:
        """The frames of an answer that `open` has begun, the last one an end.

        Args:
            call: what it answers.
            answer: the answer.
            stall_s: longest wait for more [s].

        Raises:
            TaskError: what the stream itself says; Expired where nothing came for so long, UpstreamFailed where it broke off
                or is no stream.
        """
        reader = streams.Reader()
        try:
            while piece := await answer.read(stall_s):
                for frame in reader.feed(piece):
                    if frame.kind == "error":
                        raise _believed(streams.failure(frame, call.service))
                    yield frame
                    if frame.kind == "end":
                        # The end of the HTTP answer, so that the connection can be kept; nobody misses it.
                        with contextlib.suppress(Unreachable, TimedOut):
                            await answer.read(stall_s)
                        return
            raise UpstreamFailed(f"service {call.service!r} ended a stream in the middle", stage=call.service)
        except Unreachable as error:
            self.book.failed(call.replica, time.monotonic())
            call.failed.append(call.replica)
            raise UpstreamFailed(f"service {call.service!r} broke off ({error})", stage=call.service) from None
        except TimedOut:
            raise Expired(f"no token came from service {call.service!r} for {stall_s:.3f} s", stage=call.service) from None
        except ValueError as error:
            raise UpstreamFailed.nonsense(call.service, error) from None
        finally:
            answer.close()

    async def _asked(self, call: Call, ask: Callable[[str, Sequence[Part], Mapping[str, str], float], Awaitable[A]]) -> A:
        # No content type: to our own stages the length of the JSON part says it all.
        headers = dict(call.trace)
        if call.header_length is not None:
            headers[HEADER_LENGTH] = str(call.header_length)
        self._retries.request()
        refusal: errors.TaskError = NoReplica(f"service {call.service!r} has no ready replica", stage=call.service)
        for attempt, candidate in enumerate(self._in_order(call.candidates)):
            now = time.monotonic()
            if attempt and not (call.due - now > call.least_s and self._retries.allow()):
                break
            call.replica = candidate.replica
            try:
                answer = await ask(candidate.url, call.body, headers, max(call.due - now, 0.001))
            except Unreachable as error:
                self.book.failed(candidate.replica, time.monotonic())
                call.failed.append(candidate.replica)
                refusal = UpstreamFailed(f"service {call.service!r} could not be reached ({error})", stage=call.service)
                continue
            except TimedOut:
                raise Expired(f"the deadline passed while service {call.service!r} worked", stage=call.service) from None
            finally:
                call.elapsed_s = time.monotonic() - now
            if answer.status == 200 or not isinstance(answer, HttpAnswer):
                return answer
            refusal = _refusal(answer, call.service)
            if answer.status not in RETRY_STATUSES or refusal.stage != call.service:
                break
        raise refusal

    def allow_retry(self) -> bool:
        """Take a token of the retry budget for a second walk of a whole chain."""
        return self._retries.allow()

    def _in_order(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """At most two, those this process knows to be dead last."""
        now = time.monotonic()
        return sorted(candidates, key=lambda candidate: self.book.ejected(candidate.replica, now))[:2]


def _refusal(answer: HttpAnswer, service: str) -> errors.TaskError:
    try:
        body = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        body = {}
    after = answer.headers.get("retry-after", "")
    error = errors.from_answer(
        answer.status,
        body if isinstance(body, dict) else {},
        stage=service,
        retry_after_s=float(after) if after.isdecimal() else None,
    )
    return _believed(error)


def _believed(error: errors.TaskError) -> errors.TaskError:
    """What another process said went wrong, with its hops' reports only where they are some."""
    try:
        error.hops = itinerary.reports(error.hops)
    except ValueError:
        error.hops = []  # not one of our stages, or a broken one: what it says of hops is no news
    return error
