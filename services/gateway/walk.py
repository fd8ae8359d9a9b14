"""Walks one task through its pipeline: a call per segment, branches at once, joins here.

Choosing replicas and writing the itinerary happen at the moment of the call, with the newest news there is.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from services.dataplane import admission, deadline, itinerary, letting_out, streams, wire
from services.dataplane.deadline import Deadline
from services.dataplane.errors import NoReplica, Overloaded, TaskError, UpstreamFailed
from services.dataplane.itinerary import Further, Hop
from services.dataplane.routing import MAX_CANDIDATES, RouteBook
from services.dataplane.streams import Frame, Pace
from services.dataplane.wire import Limits, Tensor
from services.forward import Call, Forwarder
from services.gateway.table import Plan, Standby, Table, Target
from services.transport import HttpAnswer, StreamedAnswer

A = TypeVar("A", HttpAnswer, StreamedAnswer)

Hops = list[dict[str, Any]]


class Walker:
    """Sends tasks through segments and learns from every answer how the replicas fare."""

    def __init__(
        self, forwarder: Forwarder, node: str, rng: random.Random, limits: Limits, tell: Callable[[str, str], None]
    ) -> None:
        """Begin knowing nothing of any replica.

        Args:
            forwarder: makes the calls.
            node: where this gateway runs.
            rng: for the two choices.
            limits: on answers.
            tell: called with service and replica when a standby has been let out; must not block.
        """
        self._forwarder = forwarder
        self._book: RouteBook = forwarder.book
        self._node = node
        self._rng = rng
        self._limits = limits
        self._tell = tell

    def admit(self, table: Table, plan: Plan, until: Deadline) -> None:
        """Let the task in, or refuse it.

        Raises:
            NoReplica: a service of the pipeline has no ready replica, and no standby that may be let out.
            Overloaded: the predicted completion is past the deadline.
        """
        now = time.monotonic()
        hop_s = {}
        for service in plan.services:
            target = table.targets[service]
            if not target.served:
                raise NoReplica(f"service {service!r} has no ready replica", stage=service)
            hop_s[service] = admission.replica_s(self._book, target.replicas, now)
        predicted_s = admission.critical_path_s(plan.segments, hop_s)
        excess_s = admission.excess_s(predicted_s, until.budget_s)
        if excess_s > 0 and admission.excess_s(self._with_standbys_s(table, plan, hop_s, now), until.budget_s) > 0:
            raise Overloaded(
                f"the predicted time of {predicted_s * 1e3:.1f} ms is over the deadline of {until.budget_s * 1e3:.1f} ms",
                retry_after_s=excess_s,
            )

    def _with_standbys_s(self, table: Table, plan: Plan, hop_s: Mapping[str, float], now: float) -> float:
        """The predicted time [s] if every standby that may be let out were."""
        best_s = dict(hop_s)
        for service in plan.services:
            target = table.targets[service]
            if target.standbys:
                everybody = (*target.replicas, *(standby.candidate.replica for standby in target.standbys))
                best_s[service] = admission.replica_s(self._book, everybody, now)
        return admission.critical_path_s(plan.segments, best_s)

    async def run(
        self, table: Table, plan: Plan, tensors: Mapping[str, Tensor], until: Deadline, trace: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], Hops]:
        """Compute a task.

        Args:
            table: who serves what.
            plan: the task's pipeline.
            tensors: the request's, by reference (`request.NAME`).
            until: the task's deadline.
            trace: headers passed on to every stage.

        Returns:
            Every tensor the gateway has seen, by reference, and what each hop measured.

        Raises:
            TaskError: the first thing that went wrong; the other branches have been cancelled.
        """
        bag = dict(tensors)
        if len(plan.segments) == 1:
            return bag, await self._segment(table, plan, 0, bag, until, trace, 0.0)
        return bag, await self._branches(table, plan, len(plan.segments), bag, until, trace)

    async def stream(
        self,
        table: Table,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        until: Deadline,
        pace: Pace,
        trace: Mapping[str, str],
    ) -> AsyncGenerator[tuple[dict[str, Tensor], Hops]]:
        """Compute a task whose last segment answers in frames; arguments, results and errors are those of `run`.

        Yields what there is whenever there is more of it; the deadline is what the pace says. The hops are complete with the
        end. An answer that is wanted whole is begun once more where a replica dies in the middle; what is yielded then starts
        at its beginning again.
        """
        bag = dict(tensors)
        last = len(plan.segments) - 1
        before = await self._branches(table, plan, last, bag, until, trace) if last else []
        again, begun = pace.whole, False
        while True:
            call, answer = await self._asked(table, plan, last, bag, until, trace, 0.0, self._forwarder.open, pace)
            try:
                hops = self._read_hops(call, answer.headers)
            except TaskError:
                answer.close()
                raise
            # Now, and not at the end: a stream may last long, or be ended by whoever has read enough of it.
            asyncio.get_running_loop().call_soon(self._learn, hops)
            try:
                async with aclosing(self._forwarder.frames(call, answer, pace.stall_s)) as frames:
                    async for frame in frames:
                        if frame.kind == "end":
                            self._learn_end(call, frame, hops)
                            continue
                        length = None if frame.header_length is None else str(frame.header_length)
                        self._take_in(plan, last, bag, call, frame.payload, length)
                        begun = True
                        yield bag, before + hops
                if not begun:
                    raise UpstreamFailed.nonsense(call.service, "it ended a stream before it began")
                return
            except TaskError as error:
                self._learn(error.hops)
                if not (again and isinstance(error, UpstreamFailed) and self._may_repeat(call, until)):
                    raise
                again = False

    async def _branches(
        self,
        table: Table,
        plan: Plan,
        count: int,
        bag: dict[str, Tensor],
        until: Deadline,
        trace: Mapping[str, str],
    ) -> Hops:
        """Walk the first `count` segments, each as soon as its parents are done."""
        after_s = self._after(table, plan)
        done = [asyncio.Event() for _ in plan.segments]
        hops: list[Hops] = [[] for _ in plan.segments]

        async def branch(index: int) -> None:
            for parent in plan.segments[index].parents:
                await done[parent].wait()
            hops[index] = await self._segment(table, plan, index, bag, until, trace, after_s[index])
            done[index].set()

        try:
            async with asyncio.TaskGroup() as group:
                for index in range(count):
                    group.create_task(branch(index))
        except ExceptionGroup as errors:
            # Not `except*`: what is raised in there comes out in a group again in early releases of Python 3.11 (3.11.2 of
            # Debian 12, for one), and the task would fail as if by our fault.
            raise errors.exceptions[0] from None
        return [hop for each in hops for hop in each]

    async def _segment(
        self,
        table: Table,
        plan: Plan,
        index: int,
        bag: dict[str, Tensor],
        until: Deadline,
        trace: Mapping[str, str],
        after_s: float,
    ) -> Hops:
        """Call one chain, put what it returns into the bag, and give back its hops."""
        call, answer = await self._asked(table, plan, index, bag, until, trace, after_s, self._forwarder.post)
        hops = self._read_hops(call, answer.headers)
        self._take_in(plan, index, bag, call, answer.body, answer.headers.get(wire.HEADER_LENGTH))
        # Learnt at the loop's next turn: the answer, or the next segment's request, goes first.
        asyncio.get_running_loop().call_soon(self._learn, hops)
        return hops

    async def _asked(
        self,
        table: Table,
        plan: Plan,
        index: int,
        bag: Mapping[str, Tensor],
        until: Deadline,
        trace: Mapping[str, str],
        after_s: float,
        ask: Callable[[Call], Awaitable[A]],
        pace: Pace | None = None,
    ) -> tuple[Call, A]:
        """Call one chain, a second time where a replica further down died."""
        tensors = tuple(Tensor(ref, bag[ref].datatype, bag[ref].array) for ref in plan.segments[index].sends)
        call = self._call(table, plan, index, tensors, until, trace, after_s, pace)
        try:
            return call, await ask(call)
        except TaskError as error:
            _measure_way(error.hops, call)
            self._learn(error.hops)
            # A replica further down died with nobody to take over from there: once more, around the dead.
            deeper = isinstance(error, UpstreamFailed) and error.stage != call.service
            if not (deeper and self._may_repeat(call, until)):
                raise
            call = self._call(table, plan, index, tensors, until, trace, after_s, pace)
            return call, await ask(call)

    def _may_repeat(self, call: Call, until: Deadline) -> bool:
        """Whether there is time to walk a chain once more, and the retry budget allows it; then it has been taken from."""
        return until.remaining_s(time.monotonic()) > call.least_s and self._forwarder.allow_retry()

    def _read_hops(self, call: Call, headers: Mapping[str, str]) -> Hops:
        try:
            hops = itinerary.read_header(headers.get(itinerary.HEADER))
        except ValueError as error:
            raise UpstreamFailed.nonsense(call.service, error) from None
        _measure_way(hops, call)
        return hops

    def _take_in(
        self, plan: Plan, index: int, bag: dict[str, Tensor], call: Call, body: bytes, header_length: str | None
    ) -> None:
        """Put into the bag what a chain has answered."""
        try:
            message = wire.decode_response(body, header_length, self._limits)
            fresh = {tensor.name: tensor for tensor in message.tensors}
            bag.update((ref, fresh[ref]) for ref in plan.segments[index].returns)
        except (TaskError, ValueError, KeyError) as error:
            raise UpstreamFailed.nonsense(call.service, error) from None

    def _call(
        self,
        table: Table,
        plan: Plan,
        index: int,
        tensors: tuple[Tensor, ...],
        until: Deadline,
        trace: Mapping[str, str],
        after_s: float,
        pace: Pace | None,
    ) -> Call:
        now = time.monotonic()
        hops = self._hops(table, plan, index, until, now, after_s)
        for hop in hops:
            self._book.sent(hop.candidates[0].replica, now)
        parameters: dict[str, Any] = {
            itinerary.PARAMETER: itinerary.to_parameter(hops),
            deadline.PARAMETER: deadline.to_parameter(until.remaining_s(now)),
        }
        if pace is not None:
            parameters[streams.PARAMETER] = pace.to_parameter()
        body, header_length = wire.request_parts(wire.Message(tensors, parameters=parameters))
        return Call(
            service=hops[0].service,
            candidates=hops[0].candidates,
            body=body,
            header_length=header_length,
            due=until.due,
            least_s=hops[0].reserve_s,
            trace=trace,
        )

    def _hops(self, table: Table, plan: Plan, index: int, until: Deadline, now: float, after_s: float) -> tuple[Hop, ...]:
        """A segment's itinerary; the reserve of a hop is what the hops behind it and the segments after it will take."""
        segment = plan.segments[index]
        chosen: list[tuple[int, ...]] = []
        node = self._node
        for position, step in enumerate(segment.steps):
            target = table.targets[step.service]
            order: tuple[int, ...] = ()
            links_s: list[float] = []
            if target.replicas:
                links_s = [table.link(node, other).transfer_s(target.input_bytes) for other in target.nodes]
                order = self._book.order(target.replicas, links_s, now, self._rng)
            if target.standbys and self._is_due(table, plan, index, position, order, until.due - after_s, now):
                order = self._book.best_first(order, target.replicas, links_s, now)
                if self._is_due(table, plan, index, position, order, until.due - after_s, now):
                    target, order = self._let_out(table, step.service, order, node, now)
            if not order:
                raise NoReplica(f"service {step.service!r} has no ready replica", stage=step.service)
            node = target.nodes[order[0]]
            chosen.append(order)
        reserve_s = after_s
        hops: list[Hop] = []
        for position in range(len(segment.steps) - 1, -1, -1):
            step, target = segment.steps[position], table.targets[segment.steps[position].service]
            candidates = tuple(target.candidates[i] for i in chosen[position])
            parts = tuple(self._further(table, service, now) for service in step.parts) if step.parts else ()
            hops.append(Hop(step.id, step.service, candidates, step.inputs, segment.keeps[position], reserve_s, parts))
            view = self._book.view(candidates[0].replica)
            reserve_s += view.service_s + view.transfer_s
        return tuple(reversed(hops))

    def _further(self, table: Table, service: str, now: float) -> Further:
        """All replicas of a further part, those that are alive first: a running batch keeps to the one it has begun with."""
        target = table.targets[service]
        alive = sorted(target.candidates, key=lambda candidate: self._book.ejected(candidate.replica, now))
        return Further(service, tuple(alive))

    def _is_due(
        self, table: Table, plan: Plan, index: int, position: int, order: tuple[int, ...], due: float, now: float
    ) -> bool:
        """Whether the first of the candidates is dead, or would keep the task waiting too long, or there is none.

        `due` is the instant at which the segment must be done.
        """
        rest = plan.segments[index].steps[position:]
        target = table.targets[rest[0].service]
        if not order or self._book.ejected(target.replicas[order[0]], now):
            return True
        wait_s = self._book.view(target.replicas[order[0]]).expected_wait_s(now)
        if wait_s <= 0.0:
            return False
        slack_s = due - now - sum(self._work_s(table.targets[step.service]) for step in rest)
        return letting_out.is_due(wait_s, slack_s, len(rest) + plan.hops_after[index], target.service.patience)

    def _let_out(
        self, table: Table, service: str, order: tuple[int, ...], node: str, now: float
    ) -> tuple[Target, tuple[int, ...]]:
        """Let the nearest living standby out, and prefer it; without one, all stays as it is."""
        target = table.targets[service]
        living = [standby for standby in target.standbys if not self._book.ejected(standby.candidate.replica, now)]
        if not living:
            return target, order

        def completion_s(standby: Standby) -> float:
            link_s = table.link(node, standby.node).transfer_s(target.input_bytes)
            return self._book.completion_s(standby.candidate.replica, link_s, now)

        nearest = min(living, key=completion_s)
        if order:
            letting_out.introduce(self._book, nearest.candidate.replica, target.replicas[order[0]])
        target = table.let_out(service, nearest)
        self._tell(service, nearest.candidate.replica)
        return target, (len(target.replicas) - 1, *order)[:MAX_CANDIDATES]

    def _after(self, table: Table, plan: Plan) -> list[float]:
        """For each segment, the time [s] the longest way from its end to the pipeline's needs, without waits."""
        work_s = [sum(self._work_s(table.targets[step.service]) for step in segment.steps) for segment in plan.segments]
        after = [0.0] * len(plan.segments)
        for index in range(len(plan.segments) - 1, -1, -1):
            for parent in plan.segments[index].parents:
                after[parent] = max(after[parent], work_s[index] + after[index])
        return after

    def _work_s(self, target: Target) -> float:
        views = [self._book.view(replica) for replica in target.replicas]
        return min((view.service_s + view.transfer_s for view in views), default=0.0)

    def _learn_end(self, call: Call, frame: Frame, hops: Hops) -> None:
        """A stream is over: what its generating hop says now replaces what it said at the first token."""
        try:
            (report,) = itinerary.reports([frame.document()])
        except ValueError as error:
            raise UpstreamFailed.nonsense(call.service, error) from None
        for hop in hops:
            if hop["replica"] == report["replica"]:
                hop.update(report)
        self._learn([report])

    def _learn(self, hops: Hops) -> None:
        now = time.monotonic()
        for hop in hops:
            for replica in hop.get("failed", ()):
                self._book.failed(replica, now)
            self._book.answered(
                hop["replica"],
                now,
                wait_s=hop.get("wait_s", 0.0),
                # Of a stage that generates only the way to the first token: how many follow is each task's own affair, and
                # whether there is time for them the stage itself judges.
                service_s=hop.get("first_s", hop.get("compute_s")),
                transfer_s=hop.get("transfer_s"),
            )


def _measure_way(hops: Hops, call: Call) -> None:
    """What of the call the first hop did not see: the way there and back."""
    if hops:
        hops[0]["transfer_s"] = itinerary.way_s(call.elapsed_s, hops[0].get("total_s", 0.0))
