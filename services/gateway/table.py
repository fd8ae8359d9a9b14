"""The routes document compiled for use: segments, tensor specs and ready replicas looked up instead of searched for.

Built anew for every version of the document. Nothing in it changes but one thing: standbys that this gateway lets out count as
ready from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.manifest import TensorSpec, Weights
from services.dataplane.itinerary import Candidate
from services.dataplane.pipeline import Pipeline, Segment, name_of, segments, step_of
from services.dataplane.routes import Link, Replica, Routes, Service

_LOCAL = Link(latency_s=0.0, bandwidth_bytes_per_s=float("inf"))


@dataclass(frozen=True, slots=True)
class Standby:
    """A replica that may be let out."""

    node: str
    candidate: Candidate


@dataclass(frozen=True, slots=True)
class Target:
    """The ready replicas of a service, in three lists of the same order, and its standbys."""

    service: Service
    replicas: tuple[str, ...]
    nodes: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    input_bytes: float
    """Bytes of one item's inputs, for the links."""
    standbys: tuple[Standby, ...]
    """Those that may be let out: none where the allowance is spent."""
    allowance: int

    @property
    def served(self) -> bool:
        """Whether there is somebody to send to, if need be by letting a standby out."""
        return bool(self.replicas or self.standbys)


@dataclass(frozen=True, slots=True)
class Plan:
    """A pipeline, cut and typed."""

    pipeline: Pipeline
    segments: tuple[Segment, ...]
    inputs: Mapping[str, TensorSpec]
    """Tensors a request brings."""
    optional: frozenset[str]
    """Of these the ones it may leave out, since every stage that takes them has a default."""
    outputs: Mapping[str, TensorSpec]
    hops_after: tuple[int, ...]
    """For each segment, the hops of the longest way from its end to the pipeline's."""
    weights: Weights
    """`seeded` where any of its services is: then its answers are good for measuring only."""

    @property
    def services(self) -> tuple[str, ...]:
        """Every service of the pipeline, once."""
        return tuple(dict.fromkeys(service for step in self.pipeline.steps for service in step.services))


class Table:
    """What the gateway looks up for every task."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self.targets = {name: _target(service) for name, service in routes.services.items()}
        self.plans = {name: _plan(pipeline, routes.services) for name, pipeline in routes.pipelines.items()}

    def ready(self, pipeline: str) -> bool:
        """Whether every service of the pipeline has somebody to send to."""
        return all(self.targets[service].served for service in self.plans[pipeline].services)

    def link(self, source: str, destination: str) -> Link:
        """The link between two nodes; within a node, or where the testbed names none, nothing is lost."""
        return self.routes.links.get(source, {}).get(destination, _LOCAL)

    def let_out(self, service: str, standby: Standby) -> Target:
        """Count one of the service's standbys as ready, the last one, and spend the allowance."""
        old = self.targets[service]
        left = old.allowance - 1
        target = self.targets[service] = replace(
            old,
            replicas=(*old.replicas, standby.candidate.replica),
            nodes=(*old.nodes, standby.node),
            candidates=(*old.candidates, standby.candidate),
            standbys=tuple(other for other in old.standbys if other is not standby) if left else (),
            allowance=left,
        )
        return target

    def take_back(self, service: str, replica: str) -> None:
        """Undo `let_out`, as far as it happened here, and let nobody else of the service out before the next document."""
        old = self.targets.get(service)
        if old is None:
            return
        ready = sum(each.state == "ready" for each in old.service.replicas)
        stay = [i for i, name in enumerate(old.replicas) if i < ready or name != replica]
        self.targets[service] = replace(
            old,
            replicas=tuple(old.replicas[i] for i in stay),
            nodes=tuple(old.nodes[i] for i in stay),
            candidates=tuple(old.candidates[i] for i in stay),
            standbys=(),
            allowance=0,
        )


def _target(service: Service) -> Target:
    ready = [replica for replica in service.replicas if replica.state == "ready"]
    standby = [replica for replica in service.replicas if replica.state == "standby"] if service.allowance else []
    return Target(
        service=service,
        replicas=tuple(replica.id for replica in ready),
        nodes=tuple(replica.node for replica in ready),
        candidates=tuple(_candidate(service, replica) for replica in ready),
        input_bytes=float(sum(tensor.bytes_per_item for tensor in service.inputs)),
        standbys=tuple(Standby(replica.node, _candidate(service, replica)) for replica in standby),
        allowance=service.allowance,
    )


def _candidate(service: Service, replica: Replica) -> Candidate:
    return Candidate(replica.id, f"{replica.url}/v2/models/{service.name}/infer")


def _plan(pipeline: Pipeline, services: Mapping[str, Service]) -> Plan:
    stages = {step.id: services[step.service] for step in pipeline.steps}
    inputs: dict[str, TensorSpec] = {}
    optional: dict[str, bool] = {}
    for step in pipeline.steps:
        specs = {tensor.name: tensor for tensor in stages[step.id].inputs}
        for name, ref in step.inputs.items():
            if step_of(ref) == "request":
                spec = inputs.setdefault(name_of(ref), specs[name].model_copy(update={"name": name_of(ref)}))
                optional[spec.name] = optional.get(spec.name, True) and specs[name].default is not None
    outputs = {}
    for name, ref in pipeline.outputs.items():
        specs = inputs if step_of(ref) == "request" else {tensor.name: tensor for tensor in stages[step_of(ref)].outputs}
        outputs[name] = specs[name_of(ref)].model_copy(update={"name": name})
    cut = segments(pipeline)
    seeded = any(services[name].weights == "seeded" for step in pipeline.steps for name in step.services)
    return Plan(
        pipeline,
        cut,
        inputs,
        frozenset(name for name, may in optional.items() if may),
        outputs,
        _hops_after(cut),
        "seeded" if seeded else "trained",
    )


def _hops_after(cut: tuple[Segment, ...]) -> tuple[int, ...]:
    after = [0] * len(cut)
    for index in range(len(cut) - 1, -1, -1):
        for parent in cut[index].parents:
            after[parent] = max(after[parent], len(cut[index].steps) + after[index])
    return tuple(after)
