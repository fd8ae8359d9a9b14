"""A simulated replica, and what passes through it. It has the live stage's queue, estimate, route book and retry budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from loadgen.outcome import Hop
from models.manifest import ServiceLaw
from orchestrator import core
from orchestrator.simulator.world import Stage
from orchestrator.telemetry import sources
from orchestrator.telemetry.exposition import Key, Sample
from services.dataplane import batching
from services.dataplane.batching import DeadlineQueue, Waiting
from services.dataplane.routing import RetryBudget, RouteBook
from services.dataplane.service_time import ServiceEstimate

if TYPE_CHECKING:
    from orchestrator.simulator.plans import Plan

_ENDED: Key = ("stage_requests_total", ())
_LENGTH: Key = ("stage_queue_length", ())
_INFLIGHT: Key = ("stage_inflight_requests", ())
_QUEUE_S: Key = ("stage_queue_duration_seconds_sum", ())
_QUEUE_N: Key = ("stage_queue_duration_seconds_count", ())
_COMPUTE_S: Key = ("stage_compute_duration_seconds_sum", ())
_COMPUTE_N: Key = ("stage_compute_duration_seconds_count", ())
_SQUARES: Key = (sources.SQUARES, ())
_BATCHES: Key = (sources.BATCHES, ())


class Caller:
    """Whoever sends to replicas, from a node: the gateway, and every replica. Knows only what it has met itself."""

    __slots__ = ("book", "met_dead", "node", "retries")

    def __init__(self, node: str) -> None:
        self.node = node
        self.book = RouteBook()
        self.retries = RetryBudget()
        self.met_dead = False
        """Whether any replica was ever found dead: before that none is ejected, and nobody needs to look."""


class Task:
    """One task on its way. Times in seconds."""

    __slots__ = (
        "after_s", "due", "hops", "index", "left", "over", "pipeline", "plan", "scheduled", "until", "waits_for", "walks",
    )  # fmt: skip

    def __init__(self, pipeline: str, plan: Plan, index: int, scheduled: float, *, shed: bool) -> None:
        self.pipeline, self.plan, self.index, self.scheduled = pipeline, plan, index, scheduled
        self.due = scheduled + plan.deadline_s
        self.until = self.due if shed else math.inf
        """When it is given up. Without shedding the client waits on, and gets a late answer."""
        self.over = False
        self.walks: list[Walk] = []
        self.left = len(plan.segments)
        """Segments not answered yet."""
        self.waits_for = [len(segment.parents) for segment in plan.segments]
        self.after_s: Sequence[float] = ()
        self.hops: list[Hop] = []


class Walk:
    """A task's way through one segment: a call per hop, each held open by the one before until the answer comes back."""

    __slots__ = (
        "chosen", "failed", "over", "path", "reserves_s", "retried", "segment", "sent", "services_s", "target", "task",
        "transfers_s", "untried", "waiting", "waits_s",
    )  # fmt: skip

    def __init__(self, task: Task, segment: int, chosen: Sequence[tuple[str, ...]], reserves_s: Sequence[float]) -> None:
        self.task, self.segment, self.chosen, self.reserves_s = task, segment, chosen, reserves_s
        self.path: list[Replica] = []
        """Replicas reached, one a hop."""
        self.untried: list[list[str]] = []
        """For each call made, the candidates that it has not tried yet. One longer than the path while a call is on its way."""
        self.transfers_s: list[float] = []
        self.services_s: list[float] = []
        self.waits_s: list[float] = []
        """What the replicas of the path say of themselves as the answer goes back."""
        self.failed: list[str] = []
        """Replicas that stages of the path found dead."""
        self.target: Replica
        """Who the call on its way is for; set when one is."""
        self.sent = 0.0
        self.waiting: Waiting[Walk] | None = None
        self.over = False
        self.retried = False
        """Whether this is the second walk around a replica that died further down."""

    def cut(self, hops: int) -> Walk:
        """The same walk as it was when `hops` of its hops had computed and the next was being called."""
        again = Walk(self.task, self.segment, self.chosen, self.reserves_s)
        again.path, again.untried = self.path[:hops], self.untried[: hops + 1]
        again.transfers_s, again.services_s = self.transfers_s[:hops], self.services_s[:hops]
        again.failed, again.retried = self.failed, self.retried
        return again


class Batch:
    """Tasks that are computed together, on one slot of a replica."""

    __slots__ = ("members", "replica", "seconds", "start", "units")

    def __init__(self, replica: Replica, members: list[Waiting[Walk]], units: int, seconds: float, start: float) -> None:
        self.replica, self.members, self.units, self.seconds, self.start = replica, members, units, seconds, start


class Replica(Caller):
    """One running copy of a service, in any state but gone; `alive` is False from then on."""

    __slots__ = (
        "acknowledged", "alive", "batches", "compute_s", "computed", "ended", "ends", "estimate", "factors", "id", "law",
        "lengths", "max_batch", "open", "queue", "queue_s", "service", "slots", "squares", "units", "view",
    )  # fmt: skip

    def __init__(
        self, name: str, stage: Stage, node: str, speed: float, factors: Iterator[float], *, urgent_first: bool = True
    ) -> None:
        super().__init__(node)
        self.id, self.service = name, stage.service.name
        self.law = ServiceLaw(
            base_s=stage.law.base_s / speed, per_unit_s=stage.law.per_unit_s / speed, tail_ratio=stage.law.tail_ratio
        )
        self.estimate = ServiceEstimate(self.law)
        self.queue: DeadlineQueue[Walk] = DeadlineQueue(stage.queue_capacity, urgent_first=urgent_first)
        self.factors = factors
        self.lengths, self.slots, self.max_batch = stage.lengths, stage.slots, stage.max_batch
        self.units = Waiting(None, 0.0, 1, stage.lengths, 0.0, 0.0).units
        self.alive = True
        self.acknowledged = False
        """Of a draining one: the gateway no longer sends to it."""
        self.ends: dict[Batch, float] = {}
        """Expected end of each running batch."""
        self.open: dict[Walk, None] = {}
        """Walks that came here and have not been answered: a set that keeps its order."""
        self.ended = self.computed = self.batches = 0
        self.queue_s = self.compute_s = self.squares = 0.0
        s = stage.service
        self.view = core.Replica(name, s.name, node, "starting", s.cpus, s.memory_bytes, gpus=s.gpus)
        """What the runtime knows of it."""

    def expected_wait_s(self, now: float) -> float:
        """Time [s] a task arriving now would wait."""
        return batching.expected_wait_s(self.queue, self.ends.values(), self.slots, now)

    def sample(self, t: float) -> Sample:
        """The series of its exposition page that the orchestrator looks at."""
        values: Mapping[Key, float] = {
            _ENDED: self.ended,
            _LENGTH: len(self.queue),
            _INFLIGHT: len(self.open),
            _QUEUE_S: self.queue_s,
            _QUEUE_N: self.computed,
            _COMPUTE_S: self.compute_s,
            _COMPUTE_N: self.computed,
            _SQUARES: self.squares,
            _BATCHES: self.batches,
        }
        return Sample(t, values)
