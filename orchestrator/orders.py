"""What the operator ordered, kept on disk so that a restart of the orchestrator forgets none of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from orchestrator.core import Target
from services.dataplane.document import Document, keep


class Kept(Document):
    """The file."""

    targets: Mapping[str, Target] = Field(default_factory=dict)
    generations: Mapping[str, int] = Field(default_factory=dict)
    """service -> restarts ordered so far."""
    drained: tuple[str, ...] = ()
    """Nodes that are to be empty."""


class Orders:
    """The orders in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._kept = Kept.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            self._kept = Kept()

    @property
    def targets(self) -> Mapping[str, Target]:
        """Targets set by hand."""
        return self._kept.targets

    @property
    def drained(self) -> frozenset[str]:
        """Nodes that are to be empty."""
        return frozenset(self._kept.drained)

    def drain(self, node: str) -> None:
        """Order that a node be emptied, and stay so."""
        self._keep(self._kept.model_copy(update={"drained": tuple(sorted({*self._kept.drained, node}))}))

    def undrain(self, node: str) -> None:
        """Take that back; without such an order nothing changes."""
        self._keep(self._kept.model_copy(update={"drained": tuple(n for n in self._kept.drained if n != node)}))

    def generation(self, service: str) -> int:
        """Restarts of a service ordered so far."""
        return self._kept.generations.get(service, 0)

    def scale(self, service: str, target: Target) -> None:
        """Order a number of replicas."""
        self._keep(self._kept.model_copy(update={"targets": {**self._kept.targets, service: target}}))

    def release(self, service: str) -> None:
        """Take an order back; without one nothing changes."""
        left = {name: target for name, target in self._kept.targets.items() if name != service}
        self._keep(self._kept.model_copy(update={"targets": left}))

    def restart(self, services: list[str]) -> None:
        """Order that every replica of these services that runs now be replaced."""
        again = {service: self.generation(service) + 1 for service in services}
        self._keep(self._kept.model_copy(update={"generations": {**self._kept.generations, **again}}))

    def _keep(self, kept: Kept) -> None:
        keep(self._path, kept.model_dump_json())
        self._kept = kept
