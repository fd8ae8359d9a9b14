"""Pipelines and routes compiled for the hot path: segments with the bytes of every hop, and who is routed to, by service."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.core import Replica
from orchestrator.simulator.faults import LinkFault
from orchestrator.simulator.world import World
from services.dataplane import pipeline as pipelines
from services.dataplane.pipeline import Pipeline, Segment, name_of, step_of
from services.dataplane.routes import Link

if TYPE_CHECKING:
    from orchestrator.simulator.replica import Task

_LOCAL = Link(latency_s=0.0, bandwidth_bytes_per_s=float("inf"))


class Leg:
    """A segment, with what each of its hops sends."""

    __slots__ = ("children", "parents", "returns_bytes", "sends_bytes", "services", "steps")

    def __init__(self, segment: Segment, sends_bytes: Sequence[float], returns_bytes: float, children: Sequence[int]) -> None:
        self.steps = tuple(step.id for step in segment.steps)
        self.services = tuple(step.service for step in segment.steps)
        self.parents = segment.parents
        self.children = tuple(children)
        """Segments that wait for this one."""
        self.sends_bytes = tuple(sends_bytes)
        """Towards each hop."""
        self.returns_bytes = returns_bytes
        """On every link of the way back."""


class Plan:
    """A pipeline, cut into segments."""

    __slots__ = ("deadline_s", "hops_after", "legs", "roots", "segments", "services", "visits")

    def __init__(self, pipeline: Pipeline, world: World) -> None:
        self.deadline_s = pipeline.deadline_s
        self.segments = pipelines.segments(pipeline)
        self.services = tuple(dict.fromkeys(step.service for step in pipeline.steps))
        self.visits = tuple(step.service for step in pipeline.steps)
        """The service of every step."""
        sizes = _Sizes(pipeline, world)
        self.legs = tuple(
            Leg(
                segment,
                [sizes.total(refs) for refs in (segment.sends, *segment.keeps[:-1])],
                sizes.total(segment.returns),
                [i for i, other in enumerate(self.segments) if index in other.parents],
            )
            for index, segment in enumerate(self.segments)
        )
        self.roots = tuple(index for index, leg in enumerate(self.legs) if not leg.parents)
        self.hops_after = [0] * len(self.legs)
        """For each segment, the hops of the longest way from its end to the pipeline's."""
        for index in range(len(self.legs) - 1, -1, -1):
            behind = (len(self.legs[child].services) + self.hops_after[child] for child in self.legs[index].children)
            self.hops_after[index] = max(behind, default=0)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes behind the references of a pipeline, for a task of one item."""

    pipeline: Pipeline
    world: World

    def total(self, refs: Sequence[str]) -> float:
        return sum(self._of(ref) for ref in refs)

    def _of(self, ref: str) -> float:
        for step in self.pipeline.steps:
            stage = self.world.stages[step.service]
            if step.id == step_of(ref):
                return stage.outputs.get(name_of(ref), 0.0)
            taken = [name for name, source in step.inputs.items() if source == ref and step_of(ref) == pipelines.REQUEST]
            if taken:
                return stage.inputs.get(taken[0], 0.0)
        return 0.0


class Routed:
    """The replicas of a service that the gateway sends to, and the links to them as the router counts them."""

    __slots__ = ("_bytes", "_links", "_links_s", "ids", "nodes", "replicas")

    def __init__(self, replicas: Sequence[Replica], input_bytes: float, world: World) -> None:
        self.replicas = tuple(replicas)
        self.ids = tuple(replica.id for replica in replicas)
        self.nodes = tuple(replica.node for replica in replicas)
        self._bytes, self._links = input_bytes, world.links
        self._links_s: dict[str, tuple[float, ...]] = {}

    def links_s(self, node: str) -> tuple[float, ...]:
        """Transfer time [s] from a node to each of the replicas."""
        found = self._links_s.get(node)
        if found is None:
            found = self._links_s[node] = tuple(
                self._links.get((node, other), _LOCAL).transfer_s(self._bytes) if other != node else 0.0 for other in self.nodes
            )
        return found


class Wire:
    """A link in one direction: one transfer after the other, in order of their start."""

    __slots__ = ("_link", "bytes_per_s", "cut", "faults", "free_at", "latency_s")

    def __init__(self, link: Link) -> None:
        self._link = link
        self.faults: list[LinkFault] = []
        """Those that last; `suffer` when they have changed."""
        self.free_at = 0.0
        self.suffer()

    def suffer(self) -> None:
        """Take the faults in."""
        self.latency_s = self._link.latency_s * math.prod(fault.latency_factor for fault in self.faults)
        self.bytes_per_s = self._link.bandwidth_bytes_per_s * math.prod(fault.bandwidth_factor for fault in self.faults)
        self.cut = any(fault.cut for fault in self.faults)

    def send(self, now: float, size_bytes: float) -> float:
        """When what is sent now has arrived whole [s]: after whatever is under way in this direction."""
        self.free_at = max(now, self.free_at) + size_bytes / self.bytes_per_s
        return self.free_at + self.latency_s


class Stream:
    """The arrivals of a pipeline, one after the other, and those of its tasks that may still run out of time."""

    __slots__ = ("index", "pending", "pipeline", "plan", "times")

    def __init__(self, pipeline: str, plan: Plan, times: Sequence[float]) -> None:
        self.pipeline, self.plan, self.times = pipeline, plan, times
        self.index = 0
        """Of the next task."""
        self.pending: deque[Task] = deque()
        """In order of arrival, and so of their deadlines, which are all equally far away: one event of the kernel is enough for
        all of them. Those that have ended leave when they come to the front."""
