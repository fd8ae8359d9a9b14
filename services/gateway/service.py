"""A task's life at the gateway: from a request to exactly one outcome, counted once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from models.manifest import BATCH_AXIS
from services.dataplane import deadline, itinerary, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import (
    BadRequest,
    Expired,
    NoReplica,
    NotFound,
    Overloaded,
    QueueFull,
    TaskError,
    TooLarge,
)
from services.dataplane.pipeline import name_of
from services.dataplane.routing import RetryBudget, RouteBook
from services.dataplane.streams import Pace
from services.dataplane.wire import Limits, Message, Tensor
from services.forward import Forwarder, passed_on
from services.gateway.metrics import GatewayMetrics
from services.gateway.recognition import TOKENS_MADE
from services.gateway.subscription import Subscription
from services.gateway.table import Plan, Table
from services.gateway.walk import Hops, Walker
from services.hotpath import Answer, Request, Stream, content
from services.transport import Transport

R = TypeVar("R", Answer, Answer | Stream)

Trace = dict[str, str]
"""Headers that every stage gets too, among them the request's id."""

Enough = Callable[[Mapping[str, Tensor]], bool]
"""Told of the outputs of a task as far as they have come: whether that is all that is wanted."""

REQUEST_ID = "x-request-id"
VERSION = "1"
LONGEST_DEADLINE_S = 60.0
HOPS_WANTED = "hops"
"""Request parameter (true): list what each hop measured in the answer's parameters, for those who cannot read headers."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What a pipeline computed, by output name, and the time line."""

    tensors: dict[str, Tensor]
    hops: Hops
    elapsed_s: float


class GatewayService:
    """The data plane of a gateway."""

    def __init__(
        self,
        subscription: Subscription,
        transport: Transport,
        metrics: GatewayMetrics,
        book: RouteBook,
        *,
        node: str,
        limits: Limits,
        max_in_flight: int,
        let_out: Callable[[str, str], None],
    ) -> None:
        self.draining = False
        self.in_flight = 0
        self._subscription = subscription
        self._metrics = metrics
        self._limits = limits
        self._max_in_flight = max_in_flight
        self._announce = let_out
        # Only which of two equal replicas is tried first hangs on these draws, so no seed is asked of the user.
        self._walker = Walker(Forwarder(transport, book, RetryBudget()), node, random.Random(), limits, self._let_out)

    @property
    def table(self) -> Table:
        """The routes in use."""
        return self._subscription.table

    def plan(self, model: str, version: str = VERSION) -> Plan:
        """The pipeline of that name.

        Raises:
            NotFound: there is none; the message lists those there are.
        """
        plan = self.table.plans.get(model)
        if plan is None:
            raise NotFound(f"no pipeline {model!r}; this gateway serves {', '.join(self.table.plans) or 'none yet'}")
        if version != VERSION:
            raise NotFound(f"pipeline {model!r} has no version {version!r}, only {VERSION}")
        return plan

    def _let_out(self, service: str, replica: str) -> None:
        self._metrics.let_out(service)
        self._announce(service, replica)

    async def serve(self, request: Request, work: Callable[[Request, Trace], Awaitable[R]]) -> R:
        """Give a request its id, which goes with it to every stage and comes back on whatever becomes of it."""
        trace = trace_of(request.headers)
        try:
            answer = await work(request, trace)
        except TaskError as error:
            error.request_id = trace[REQUEST_ID]
            raise
        answer.headers.append((REQUEST_ID.encode(), trace[REQUEST_ID].encode("latin-1")))
        return answer

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what happens before a request is a task: what is refused there is counted as a bad request."""
        try:
            yield
        except TaskError as error:
            self._metrics.bad_request(error.reason)
            raise

    async def infer(self, request: Request, trace: Trace) -> Answer:
        """`POST /v2/models/PIPELINE/infer`, by way of `serve`."""
        with self.reading():
            plan = self.plan(request.parameters["model"], request.parameters.get("version", VERSION))
            message = wire.decode_request(request.body, request.headers.get(wire.HEADER_LENGTH), self._limits)
            tensors = _inputs(plan, message)
            wanted = _wanted(plan, message)
            until = self.deadline(plan, request, message.parameters)
        answered = await self.run(plan, tensors, until, trace)
        response = Message(
            tensors=tuple(answered.tensors[name] for name in wanted),
            id=message.id,
            parameters={itinerary.HOPS: answered.hops} if message.parameters.get(HOPS_WANTED) is True else {},
            binary=message.binary,
        )
        encoded, header_length = wire.encode_response(response, model=plan.pipeline.name, version=VERSION)
        return Answer(200, [*content(header_length), server_timing(answered)], encoded)

    async def run(
        self, plan: Plan, tensors: Mapping[str, Tensor], until: Deadline, trace: Trace, enough: Enough | None = None
    ) -> Answered:
        """Compute a task and count its outcome, whatever it is.

        Args:
            plan: the pipeline.
            tensors: the request's tensors by reference; those with a default may be missing.
            until: its deadline.
            trace: headers to pass on.
            enough: told of the outputs as far as they have come; True ends the task there, as if it were complete.
        """
        outcome: str | None = "failed"
        tokens: Tensor | None = None
        self.in_flight += 1
        try:
            table = self._admitted(plan, until)
            tensors = _filled(plan, tensors)
            if enough is None:
                bag, hops = await self._walker.run(table, plan, tensors, until, trace)
            else:
                bag, hops = await self._until(enough, table, plan, tensors, until, trace)
            now = time.monotonic()
            outcome = "on_time" if now <= until.due else "late"
            outputs = _outputs(plan, bag)
            tokens = outputs.get(TOKENS_MADE)
            return Answered(outputs, hops, now - until.arrived)
        except TaskError as error:
            outcome = self._failed(error, until)
            raise
        except BaseException as error:
            # Cancelled: the client left, or the gateway is stopping. Anything else stays a failure of ours.
            outcome = "failed" if isinstance(error, Exception) else "cancelled"
            raise
        finally:
            self._count(plan, until, outcome, time.monotonic(), tokens)

    async def _until(
        self, enough: Enough, table: Table, plan: Plan, tensors: Mapping[str, Tensor], until: Deadline, trace: Trace
    ) -> tuple[dict[str, Tensor], Hops]:
        """As `Walker.run`, as far as it needs to go."""
        states = self._walker.stream(table, plan, tensors, until, Pace(None, until.budget_s, whole=True), trace)
        try:
            async with asyncio.timeout(until.remaining_s(time.monotonic())), aclosing(states):
                async for state in states:
                    if enough(_outputs(plan, state[0])):
                        break
        except TimeoutError:
            raise Expired("the deadline passed while the answer was being made") from None
        return state

    async def stream(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        until: Deadline,
        trace: Trace,
        enough: Enough = lambda outputs: False,
    ) -> AsyncGenerator[Answered]:
        """Compute a task piece by piece and count its one outcome; arguments and errors are those of `run`.

        Args:
            plan: the pipeline.
            tensors: the request's tensors by reference.
            until: the deadline of the first piece.
            trace: headers to pass on.
            enough: told of the outputs before each is yielded; True ends the task there, as if it were complete.

        Yields:
            The outputs as far as they have come, whenever there is more of them. The task is on time when the first ones came
            by its deadline and no wait for more was longer than the pipeline's `token_deadline_s`. Time in which the client
            did not read is not waited for.
        """
        outcome: str | None = "failed"
        pace = Pace.of(plan.pipeline.token_deadline_s, until.budget_s)
        first = since = 0.0
        late = False
        tokens: Tensor | None = None
        self.in_flight += 1
        try:
            table = self._admitted(plan, until)
            async with aclosing(self._walker.stream(table, plan, _filled(plan, tensors), until, pace, trace)) as states:
                async for bag, hops in states:
                    now = time.monotonic()
                    if not first:
                        first, late = now, now > until.due
                        self._metrics.first_token.labels(plan.pipeline.name).observe(now - until.arrived)
                    else:
                        late = late or (pace.token_s is not None and now - since > pace.token_s)
                        self._metrics.between_tokens.labels(plan.pipeline.name).observe(now - since)
                    outputs = _outputs(plan, bag)
                    tokens = outputs.get(TOKENS_MADE)
                    ends = enough(outputs)
                    if ends:
                        outcome = "late" if late else "on_time"
                    yield Answered(outputs, hops, now - until.arrived)
                    if ends:
                        return
                    since = time.monotonic()
            outcome = "late" if late else "on_time"
        except TaskError as error:
            outcome = self._failed(error, until, begun=first > 0)
            raise
        except BaseException as error:
            if outcome == "failed" and not isinstance(error, Exception):
                outcome = "cancelled"
            raise
        finally:
            self._count(plan, until, outcome, first or time.monotonic(), tokens)

    def _admitted(self, plan: Plan, until: Deadline) -> Table:
        """The routes to walk a task by, which counts as in flight already; raises where it is not let in."""
        if self.in_flight > self._max_in_flight:
            raise QueueFull(f"the gateway holds {self._max_in_flight} tasks already", retry_after_s=1.0)
        table = self.table
        self._walker.admit(table, plan, until)
        return table

    def _failed(self, error: TaskError, until: Deadline, *, begun: bool = False) -> str | None:
        """The outcome of a task that failed, whose error is told what is known of it.

        What has begun to be answered was a task, whatever a stage finds wrong with it then.
        """
        outcome = _outcome(error) or ("failed" if begun else None)
        if outcome is None:
            self._metrics.bad_request(error.reason)
        error.budget_s = until.budget_s
        error.elapsed_s = time.monotonic() - until.arrived
        return outcome

    def _count(self, plan: Plan, until: Deadline, outcome: str | None, met: float, tokens: Tensor | None) -> None:
        """A task has ended; `met` is when it met its deadline, or did not [s, monotonic]."""
        self.in_flight -= 1
        if outcome is not None:
            # Counted at the loop's next turn, when the answer is on its way.
            count = (plan.pipeline.name, outcome, time.monotonic() - until.arrived, until.remaining_s(met))
            asyncio.get_running_loop().call_soon(self._metrics.task, *count)
        if tokens is not None:
            self._metrics.tokens(plan.pipeline.name, int(tokens.array.sum()))

    def deadline(self, plan: Plan, request: Request, parameters: Mapping[str, Any]) -> Deadline:
        """The task's deadline: what the request says, else the pipeline's."""
        default_s = plan.pipeline.deadline_s
        budget_s = deadline.read_budget_s(request.headers, parameters, default_s=default_s, maximum_s=LONGEST_DEADLINE_S)
        return Deadline(request.arrived, budget_s)


def trace_of(headers: Mapping[str, str]) -> Trace:
    """The headers every stage gets too; a request that comes without an id is given one."""
    trace = passed_on(headers)
    if REQUEST_ID not in trace:
        trace[REQUEST_ID] = f"{random.getrandbits(128):032x}"
    return trace


def server_timing(answered: Answered) -> tuple[bytes, bytes]:
    """The `Server-Timing` header: total, and queue, compute and way of each hop [ms]."""
    parts = [f"total;dur={answered.elapsed_s * 1e3:.3f}"]
    for hop in answered.hops:
        times = (("q", hop.get("queue_s")), ("c", hop.get("compute_s")), ("n", hop.get("transfer_s")))
        parts += [f"{hop['step']}-{key};dur={seconds * 1e3:.3f}" for key, seconds in times if seconds is not None]
    return b"server-timing", ", ".join(parts).encode()


def _outcome(error: TaskError) -> str | None:
    """How a task ended that failed; None where a stage found that the request never was one (a text that is too long, say)."""
    if isinstance(error, BadRequest | NotFound | TooLarge):
        return None
    if isinstance(error, Expired):
        return "expired"
    return "rejected" if isinstance(error, QueueFull | Overloaded | NoReplica) else "failed"


def _outputs(plan: Plan, bag: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: Tensor(name, bag[ref].datatype, bag[ref].array) for name, ref in plan.pipeline.outputs.items()}


def _inputs(plan: Plan, message: Message) -> dict[str, Tensor]:
    tensors = {f"request.{tensor.name}": tensor for tensor in message.tensors}
    for tensor in message.tensors:
        spec = plan.inputs.get(tensor.name)
        if spec is None:
            raise BadRequest(f"pipeline {plan.pipeline.name!r} has no input {tensor.name!r}; it takes {', '.join(plan.inputs)}")
        if tensor.datatype != spec.datatype:
            raise BadRequest(f"input {tensor.name!r} must be {spec.datatype}, not {tensor.datatype}")
        if tensor.array.ndim != len(spec.shape):
            raise BadRequest(f"input {tensor.name!r} must have shape {list(spec.shape)}, not {list(tensor.array.shape)}")
    for name in plan.inputs:
        if f"request.{name}" not in tensors and name not in plan.optional:
            raise BadRequest(f"input {name!r} of pipeline {plan.pipeline.name!r} is missing")
    return tensors


def _filled(plan: Plan, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors, and of every input that was left out its default, for as many items as there are."""
    left_out = [plan.inputs[name] for name in plan.optional if f"request.{name}" not in tensors]
    if not left_out:
        return tensors
    # Those that must be there first: they say how many items there are, and one of another length is then told to be wrong.
    first = sorted(tensors.items(), key=lambda item: name_of(item[0]) in plan.optional)
    given = ((tensor.array.shape, plan.inputs[name_of(ref)].batch_axis) for ref, tensor in first)
    items = next((shape[axis] for shape, axis in given if axis is not None), 1)
    filled = dict(tensors)
    for spec in left_out:
        filled[f"request.{spec.name}"] = Tensor(spec.name, spec.datatype, wire.filled(spec, {BATCH_AXIS: items}))
    return filled


def _wanted(plan: Plan, message: Message) -> tuple[str, ...]:
    for name in message.outputs or ():
        if name not in plan.outputs:
            raise BadRequest(f"pipeline {plan.pipeline.name!r} has no output {name!r}; it has {', '.join(plan.outputs)}")
    return message.outputs or tuple(plan.outputs)
