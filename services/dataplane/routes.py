"""The routes document: all that a gateway knows of the testbed, published by the orchestrator and kept on disk.

One versioned JSON document, `GET /v1/routes`. A gateway that holds it can serve without the orchestrator.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from models.manifest import Name, TensorSpec, Tier, Weights
from services.dataplane import letting_out
from services.dataplane.document import Document, keep
from services.dataplane.pipeline import Pipeline

ReplicaState = Literal["starting", "standby", "ready", "draining"]


class Replica(Document):
    """One running copy of a service. `ready` ones are routed to; `standby` ones are loaded, warm and idle, until let out."""

    id: str
    node: str
    url: str
    """Base address, http://HOST:PORT, without a slash at the end."""
    state: ReplicaState


class Link(Document):
    """What it costs to send bytes from one node to another."""

    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)

    def transfer_s(self, size_bytes: float) -> float:
        """Time [s] from the first byte sent to the last one received on an idle link."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s


class Service(Document):
    """A stage as deployed, with its replicas."""

    name: Name
    model: Name
    stage: Name
    tier: Tier
    weights: Weights = "trained"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    replicas: tuple[Replica, ...] = ()
    allowance: int = Field(default=0, ge=0)
    """Standbys that gateways may let out by themselves (`letting_out`) until the next document."""
    patience: float = Field(default=letting_out.SHARE, gt=0)
    """Share of a hop's slack that a wait may take before they do."""


class Routes(Document):
    """Everything a gateway needs to serve every pipeline of a testbed."""

    version: int = Field(ge=0)
    """Grows with every change, also across restarts of the orchestrator."""
    testbed: str
    services: Mapping[str, Service]
    pipelines: Mapping[str, Pipeline]
    links: Mapping[str, Mapping[str, Link]] = Field(default_factory=dict)
    """from node -> to node -> link; a pair that is missing, and a node to itself, costs nothing."""

    @model_validator(mode="after")
    def _pipelines_use_known_services(self) -> Routes:
        for pipeline in self.pipelines.values():
            for step in pipeline.steps:
                for service in step.services:
                    if service not in self.services:
                        raise ValueError(f"pipeline {pipeline.name!r} uses service {service!r}, which is not in the document")
        return self


def empty() -> Routes:
    """The document of a gateway that has not heard from an orchestrator yet: every task finds no pipeline."""
    return Routes(version=0, testbed="", services={}, pipelines={})


def save(routes: Routes, path: Path) -> None:
    """Keep the document on disk in one step, so that a gateway that starts meanwhile reads the old one or the new one."""
    keep(path, routes.model_dump_json())


def load(path: Path) -> Routes | None:
    """The document kept on disk, or None where there is none that can be read."""
    try:
        return Routes.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
