"""A testbed together with its exported models, as the parts of a running orchestrator take them; and how one replaces another.

While a running testbed is updated, a third plan stands between the old and the new one: the services of both, in the new
shape where both have them, and still the old pipelines. Only when every new replica is ready do the new pipelines begin, and
only then do services that are no longer wanted go. So going back is possible until then, and loses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models import manifest as manifests
from models.manifest import Manifest, ManifestError, StageSpec
from orchestrator import core, wiring
from orchestrator.core import ScalingPolicy
from orchestrator.errors import SetupFailed, UsageError
from orchestrator.marked_yaml import Problem
from orchestrator.placement import greedy
from orchestrator.routes import Map
from orchestrator.scaling import policies, site
from orchestrator.scaling.site import Site
from orchestrator.simulator import sites
from orchestrator.simulator import world as worlds
from orchestrator.testbed import Loaded, Testbed
from orchestrator.wiring import Wiring

FIXED = ("name", "gateway")
"""Sections that cannot change while the testbed is up."""
HOP_S = 0.001
"""Time of a hop beside wait, compute and link [s]: HTTP and two event loops. `make bench` measures it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A testbed file, its models, and what they are together."""

    loaded: Loaded
    manifests: Mapping[str, Manifest]
    """With a stage more for every fused service (`wiring.with_fused`)."""
    wiring: Wiring
    placed: core.Counts = field(default_factory=dict)
    """Where core replicas go (`survey.settled`); without an entry, as many as the file says go where there is room."""
    absent: frozenset[str] = frozenset()
    """Nodes that nothing is placed on: those that are not there, and those that are to be emptied."""
    avoided: frozenset[tuple[str, str]] = frozenset()
    """(service, node) where replicas fail to start."""

    @property
    def testbed(self) -> Testbed:
        """The file's content."""
        return self.loaded.testbed

    def services(self) -> dict[str, core.Service]:
        """What a replica of each service needs, and where it may be."""
        found = {service.name: service for service in self.testbed.core_services(self.wiring.tiers)}
        for name in {service for service, _ in self.avoided} & found.keys():
            nodes = tuple(node for node in self._allowed(name) if (name, node) not in self.avoided)
            found[name] = replace(found[name], nodes=nodes)
        return found

    def avoidable(self, places: Collection[tuple[str, str]]) -> frozenset[tuple[str, str]]:
        """Of these (service, node), those of services that may also be somewhere else."""
        return frozenset(
            (service, node) for service, node in places
            if service in self.testbed.services and any((service, other) not in places for other in self._allowed(service))
        )  # fmt: skip

    def _allowed(self, service: str) -> list[str]:
        """Nodes that are there, of those that the file allows."""
        nodes = self.testbed.services[service].nodes or self.testbed.nodes
        return [node.name for node in self.present() if node.name in nodes]

    def targets(self) -> dict[str, core.Target]:
        """How many replicas of each service to begin with: the file's, and of core services those that are placed."""
        placed = self._placed()
        return {
            name: replace(target, replicas=sum(placed[name].values())) if name in placed else target
            for name, target in self.testbed.targets().items()
        }

    def _placed(self) -> core.Counts:
        """What is placed on nodes that are there; a service of which nothing is goes where there is room."""
        found = core.Placement(self.placed).without(self.absent).ready
        return {name: row for name, row in found.items() if any(row.values())}

    def nodes(self) -> dict[str, core.Node]:
        """What each node has, there or not."""
        return {node.name: node for node in self.testbed.core_nodes()}

    def present(self) -> tuple[core.Node, ...]:
        """The nodes that may be placed on; all of them, where that leaves none."""
        nodes = self.testbed.core_nodes()
        return tuple(node for node in nodes if node.name not in self.absent) or nodes

    def stage(self, service: str) -> StageSpec:
        """The stage that a service is."""
        section = self.testbed.services[service]
        return self.manifests[section.model].stage(section.stage)

    def map(self) -> Map:
        """What the routes say beside the replicas."""
        return Map(self.testbed, self.manifests, self.wiring.pipelines)

    def policy(self) -> ScalingPolicy[Any]:
        """The policy that decides how many replicas there are, and where.

        Raises:
            TestbedInvalid: there is no such policy, or it has no such option.
        """
        named = self.testbed.control.policy
        try:
            return policies.make(named.name, self.site(), **named.options)
        except ValueError as error:
            raise self.loaded.complain([Problem(("control", "policy"), str(error))]) from None

    def site(self) -> Site:
        """What there is to scale: the file, and what the models' profiles know of their stages."""
        testbed, services = self.testbed, self.services()
        laws = {}
        for name, section in testbed.services.items():
            if section.precision in self.stage(name).profile:
                laws[name] = sites.law_of(worlds.stage(section, services[name], self.manifests[section.model]))
        sizes = {name: float(sum(tensor.bytes_per_item for tensor in self.stage(name).inputs)) for name in services}
        hop_s = site.hop_times(
            testbed.gateway_nodes, {name: service.nodes or tuple(testbed.nodes) for name, service in services.items()},
            testbed.link_table(), sizes, HOP_S,
        )  # fmt: skip
        return Site(
            services=tuple(services.values()),
            nodes=self.present(),
            targets=self.targets(),
            placed=self._placed(),
            flows=self.flows(),
            latencies_s=testbed.latencies_s(),
            stale_after_s=testbed.control.stale_after,
            laws=laws,
            promises={name: site.promise(pipeline, hop_s) for name, pipeline in self.wiring.pipelines.items()},
            prices=testbed.prices(),
            slot_s=testbed.control.slot,
        )

    def flows(self) -> frozenset[tuple[str, str]]:
        """Pairs of services that pass tensors on: from step to step, and between the parts of a decoder."""
        steps = [step for pipeline in self.wiring.pipelines.values() for step in pipeline.steps]
        return self.testbed.flows() | {pair for step in steps for pair in itertools.pairwise(step.services)}

    def place(self, targets: Mapping[str, core.Target], keep: core.Placement | None) -> core.Placement:
        """Nodes for these targets; what is kept stays where it is, but on nodes that are absent.

        Raises:
            Infeasible: they do not fit.
        """
        testbed = self.testbed
        return greedy.place(
            tuple(self.services().values()), self.present(), targets,
            flows=self.flows(), latencies_s=testbed.latencies_s(), keep=keep.without(self.absent) if keep is not None else None,
        )  # fmt: skip


def make(loaded: Loaded, models_dir: Path) -> Plan:
    """Read the models of a testbed and wire its pipelines.

    Raises:
        SetupFailed: a model is not exported.
        TestbedInvalid: file and models do not fit each other.
    """
    try:
        found = {name: manifests.load(models_dir / name) for name in loaded.testbed.models}
    except ManifestError as error:
        raise SetupFailed(str(error)) from None
    wired = wiring.wire(loaded.testbed, found)
    if wired.problems:
        raise loaded.complain(wired.problems)
    plan = Plan(loaded, wired.manifests, wired)
    plan.policy()
    return plan


def between(old: Plan, new: Plan) -> Plan:
    """What holds while `new` replaces `old`.

    Raises:
        UsageError: the one cannot replace the other while it is up.
    """
    _check(old, new)
    testbed = new.testbed.model_copy(
        update={part: {**getattr(old.testbed, part), **getattr(new.testbed, part)} for part in ("nodes", "models", "services")}
        | {"pipelines": old.testbed.pipelines}
    )
    manifests, problems = wiring.with_fused(testbed, {**old.manifests, **new.manifests})
    if problems:
        raise new.loaded.complain(problems)
    return Plan(
        replace(new.loaded, testbed=testbed),
        manifests,
        Wiring(old.wiring.pipelines, {**old.wiring.tiers, **new.wiring.tiers}, ()),
        {**old.placed, **new.placed},
        old.absent | new.absent,
        old.avoided | new.avoided,
    )


def _check(old: Plan, new: Plan) -> None:
    for section in FIXED:
        if getattr(old.testbed, section) != getattr(new.testbed, section):
            raise UsageError(f"{section} cannot change while the testbed is up; take it down first (espalier down)")
    for service in old.testbed.services.keys() & new.testbed.services.keys():
        before, after = old.stage(service), new.stage(service)
        if (before.inputs, before.outputs) != (after.inputs, after.outputs):
            # Old and new replicas stand side by side for a while, and a task may meet either.
            raise UsageError(
                f"service {service!r} would take or give other tensors than it does now; "
                "give the new one another name, and let the pipelines use that"
            )
