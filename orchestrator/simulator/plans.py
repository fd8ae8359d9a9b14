"""Pipelines and routes compiled for the hot path: segments with the bytes of every hop, and who is routed to, by service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.core import Replica
from orchestrator.simulator.world import World
from services.dataplane import pipeline as pipelines
from services.dataplane.pipeline import Pipeline, Segment, name_of, step_of
from services.dataplane.routes import Link

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

    __slots__ = ("deadline_s", "legs", "segments", "services")

    def __init__(self, pipeline: Pipeline, world: World) -> None:
        self.deadline_s = pipeline.deadline_s
        self.segments = pipelines.segments(pipeline)
        self.services = tuple(dict.fromkeys(step.service for step in pipeline.steps))
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

    __slots__ = ("_links_s", "ids", "nodes")

    def __init__(self, replicas: Sequence[Replica], input_bytes: float, world: World) -> None:
        self.ids = tuple(replica.id for replica in replicas)
        self.nodes = tuple(replica.node for replica in replicas)
        self._links_s: Mapping[str, tuple[float, ...]] = {
            node.name: tuple(
                world.links.get((node.name, other), _LOCAL).transfer_s(input_bytes) if other != node.name else 0.0
                for other in self.nodes
            )
            for node in world.nodes
        }

    def links_s(self, node: str) -> tuple[float, ...]:
        """Transfer time [s] from a node to each of the replicas."""
        return self._links_s[node]


class Wire:
    """A link in one direction: one transfer after the other, in order of their start."""

    __slots__ = ("bytes_per_s", "free_at", "latency_s")

    def __init__(self, link: Link) -> None:
        self.latency_s, self.bytes_per_s = link.latency_s, link.bandwidth_bytes_per_s
        self.free_at = 0.0

    def send(self, now: float, size_bytes: float) -> float:
        """When what is sent now has arrived whole [s]: after whatever is under way in this direction."""
        self.free_at = max(now, self.free_at) + size_bytes / self.bytes_per_s
        return self.free_at + self.latency_s
