"""The routes document compiled for use: segments, tensor specs and ready replicas looked up instead of searched for.

Built anew for every version of the document; nothing in it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from models.manifest import TensorSpec
from services.dataplane.itinerary import Candidate
from services.dataplane.pipeline import Pipeline, Segment, name_of, segments, step_of
from services.dataplane.routes import Link, Routes, Service

_LOCAL = Link(latency_s=0.0, bandwidth_bytes_per_s=float("inf"))


@dataclass(frozen=True, slots=True)
class Target:
    """The ready replicas of a service, in three lists of the same order."""

    service: Service
    replicas: tuple[str, ...]
    nodes: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    input_bytes: float
    """Bytes of one item's inputs, for the links."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline, cut and typed."""

    pipeline: Pipeline
    segments: tuple[Segment, ...]
    inputs: Mapping[str, TensorSpec]
    """Tensors a request must bring."""
    outputs: Mapping[str, TensorSpec]

    @property
    def services(self) -> tuple[str, ...]:
        """Every service of the pipeline, once."""
        return tuple(dict.fromkeys(step.service for step in self.pipeline.steps))


class Table:
    """What the gateway looks up for every task."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self.targets = {name: _target(service) for name, service in routes.services.items()}
        self.plans = {name: _plan(pipeline, routes.services) for name, pipeline in routes.pipelines.items()}

    def ready(self, pipeline: str) -> bool:
        """Whether every service of the pipeline has a ready replica."""
        return all(self.targets[service].replicas for service in self.plans[pipeline].services)

    def link(self, source: str, destination: str) -> Link:
        """The link between two nodes; within a node, or where the testbed names none, nothing is lost."""
        return self.routes.links.get(source, {}).get(destination, _LOCAL)


def _target(service: Service) -> Target:
    ready = [replica for replica in service.replicas if replica.state == "ready"]
    return Target(
        service=service,
        replicas=tuple(replica.id for replica in ready),
        nodes=tuple(replica.node for replica in ready),
        candidates=tuple(Candidate(replica.id, f"{replica.url}/v2/models/{service.name}/infer") for replica in ready),
        input_bytes=float(sum(tensor.bytes_per_item for tensor in service.inputs)),
    )


def _plan(pipeline: Pipeline, services: Mapping[str, Service]) -> Plan:
    stages = {step.id: services[step.service] for step in pipeline.steps}
    inputs: dict[str, TensorSpec] = {}
    for step in pipeline.steps:
        specs = {tensor.name: tensor for tensor in stages[step.id].inputs}
        for name, ref in step.inputs.items():
            if step_of(ref) == "request":
                inputs.setdefault(name_of(ref), specs[name].model_copy(update={"name": name_of(ref)}))
    outputs = {}
    for name, ref in pipeline.outputs.items():
        specs = inputs if step_of(ref) == "request" else {tensor.name: tensor for tensor in stages[step_of(ref)].outputs}
        outputs[name] = specs[name_of(ref)].model_copy(update={"name": name})
    return Plan(pipeline, segments(pipeline), inputs, outputs)
