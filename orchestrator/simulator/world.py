"""What is simulated, as frozen data: nodes, links, stages with their laws, pipelines, delays and prices.

`of_testbed` makes it of a testbed file and its profiled models; tests and scenarios write it down by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.manifest import Manifest, ServiceLaw, StageProfile, StageSpec
from orchestrator.core import Node, Service
from orchestrator.costs import Prices
from orchestrator.errors import SetupFailed
from orchestrator.simulator.laws import Gamma, Noise
from orchestrator.testbed import ServiceSection, Testbed
from orchestrator.wiring import Wiring
from services.dataplane.pipeline import Pipeline
from services.dataplane.routes import Link

LAUNCH_S = 0.4
"""From the decision to start a replica until its process opens the model's files [s]; measured with containers."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A service as deployed: what a replica needs, and how it behaves on a node of speed 1."""

    service: Service
    law: ServiceLaw
    """Mean service time of a batch, and what the stage believes of it at the start."""
    noise: Noise = field(default_factory=Gamma)
    lengths: tuple[int, ...] = ()
    """Lengths of the symbolic axes other than batch, the same for every task."""
    slots: int = 1
    """Batches computed at once."""
    max_batch: int = 1
    queue_capacity: int = 256
    start_s: float = 1.0
    """From the decision to start a replica until it is on standby [s]."""
    drain_grace_s: float = 10.0
    inputs: Mapping[str, float] = field(default_factory=dict)
    """Input tensor -> bytes of one item."""
    outputs: Mapping[str, float] = field(default_factory=dict)

    @property
    def input_bytes(self) -> float:
        """Bytes of one item's inputs, as the router counts them for its links."""
        return sum(self.inputs.values())


@dataclass(frozen=True, slots=True)
class Delays:
    """How long things take that are neither compute nor link. All in seconds."""

    routes_s: float = 0.02
    """From a change of a replica's state until the gateway sends by it: what letting a standby out takes."""
    metric_lag_s: float = 0.0
    """Age of the newest sample when a slot begins."""
    hop_s: float = 0.0
    """Of every hop beside its link: HTTP and the two ends' event loops, there and back."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything that a simulated testbed is made of. Every task brings one item."""

    nodes: tuple[Node, ...]
    stages: Mapping[str, Stage]
    pipelines: Mapping[str, Pipeline]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    """(from, to) -> link; a pair that is missing, and a node to itself, costs nothing."""
    gateway_node: str = ""
    """The first node where none is given."""
    speeds: Mapping[str, float] = field(default_factory=dict)
    """Node -> speed, by which service times are divided; 1 where none is given."""
    delays: Delays = Delays()
    prices: Prices = field(default_factory=Prices)
    surge: int = 1

    def __post_init__(self) -> None:
        names = {node.name for node in self.nodes}
        for pipeline in self.pipelines.values():
            for step in pipeline.steps:
                if step.service not in self.stages:
                    raise ValueError(f"pipeline {pipeline.name!r} uses service {step.service!r}, which the world does not have")
        for node in (*([self.gateway_node] if self.gateway_node else []), *self.speeds, *(n for ab in self.links for n in ab)):
            if node not in names:
                raise ValueError(f"the world has no node {node!r}")

    @property
    def services(self) -> dict[str, Service]:
        """What a replica of each service needs."""
        return {name: stage.service for name, stage in self.stages.items()}

    @property
    def flows(self) -> frozenset[tuple[str, str]]:
        """Pairs of services of which one takes what the other puts out."""
        found = set()
        for pipeline in self.pipelines.values():
            service_of = {step.id: step.service for step in pipeline.steps}
            found |= {(service_of[parent], step.service) for step in pipeline.steps for parent in step.parents}
        return frozenset((a, b) for a, b in found if a != b)


def of_testbed(testbed: Testbed, manifests: Mapping[str, Manifest], wiring: Wiring, delays: Delays | None = None) -> World:
    """The world that a testbed file describes, with service laws from the profiles of its models.

    Raises:
        SetupFailed: a stage has not been profiled.
    """
    services = {service.name: service for service in testbed.core_services(wiring.tiers)}
    stages = {name: stage(section, services[name], manifests[section.model]) for name, section in testbed.services.items()}
    return World(
        nodes=testbed.core_nodes(),
        stages=stages,
        pipelines=wiring.pipelines,
        links=testbed.link_table(),
        gateway_node=testbed.gateway_node,
        delays=delays or Delays(),
        prices=testbed.prices(),
        surge=testbed.control.surge,
    )


def stage(section: ServiceSection, service: Service, manifest: Manifest) -> Stage:
    """A service of a testbed, by the profile of its stage.

    Raises:
        SetupFailed: the stage has not been profiled.
    """
    spec = manifest.stage(section.stage)
    profile = _profile(section, service, spec)
    return Stage(
        service=service,
        law=profile.law,
        noise=Gamma(profile.task_cv2),
        lengths=manifest.lengths(spec.inputs[0]),
        slots=max(1, int(section.cpus_at_most)),
        max_batch=spec.max_batch if section.max_batch is None else min(section.max_batch, spec.max_batch),
        queue_capacity=section.queue_capacity,
        start_s=LAUNCH_S + profile.load_s,
        drain_grace_s=section.drain_grace,
        inputs={tensor.name: float(tensor.bytes_per_item) for tensor in spec.inputs},
        outputs={tensor.name: float(tensor.bytes_per_item) for tensor in spec.outputs},
    )


def _profile(section: ServiceSection, service: Service, spec: StageSpec) -> StageProfile:
    profile = spec.profile.get(section.precision)
    if profile is None:
        raise SetupFailed(
            f"service {service.name!r}: stage {spec.name!r} of model {section.model!r} has no profile as {section.precision}, "
            "so nothing is known of its service times; measure them first (espalier profile)"
        )
    return profile
