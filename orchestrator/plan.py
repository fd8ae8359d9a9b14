"""A testbed together with its exported models, as the parts of a running orchestrator take them; and how one replaces another.

While a running testbed is updated, a third plan stands between the old and the new one: the services of both, in the new
shape where both have them, and still the old pipelines. Only when every new replica is ready do the new pipelines begin, and
only then do services that are no longer wanted go. So going back is possible until then, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from models import manifest as manifests
from models.manifest import Manifest, ManifestError, StageSpec
from orchestrator import core, wiring
from orchestrator.errors import SetupFailed, UsageError
from orchestrator.routes import Map
from orchestrator.scaling.manual import Manual
from orchestrator.testbed import Loaded, Testbed
from orchestrator.wiring import Wiring

FIXED = ("name", "gateway")
"""Sections that cannot change while the testbed is up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A testbed file, its models, and what they are together."""

    loaded: Loaded
    manifests: Mapping[str, Manifest]
    wiring: Wiring

    @property
    def testbed(self) -> Testbed:
        """The file's content."""
        return self.loaded.testbed

    def services(self) -> dict[str, core.Service]:
        """What a replica of each service needs."""
        return {service.name: service for service in self.testbed.core_services(self.wiring.tiers)}

    def nodes(self) -> dict[str, core.Node]:
        """What each node has."""
        return {node.name: node for node in self.testbed.core_nodes()}

    def stage(self, service: str) -> StageSpec:
        """The stage that a service is."""
        section = self.testbed.services[service]
        return self.manifests[section.model].stage(section.stage)

    def map(self) -> Map:
        """What the routes say beside the replicas."""
        return Map(self.testbed, self.manifests, self.wiring.pipelines)

    def policy(self) -> Manual:
        """The policy that decides how many replicas there are, and where."""
        return Manual(
            services=tuple(self.services().values()),
            nodes=self.testbed.core_nodes(),
            targets=self.testbed.targets(),
            flows=self.testbed.flows(),
            latencies_s=self.testbed.latencies_s(),
            stale_after_s=self.testbed.control.stale_after,
        )


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
    return Plan(loaded, found, wired)


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
    return Plan(
        replace(new.loaded, testbed=testbed),
        {**old.manifests, **new.manifests},
        Wiring(old.wiring.pipelines, {**old.wiring.tiers, **new.wiring.tiers}, ()),
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
