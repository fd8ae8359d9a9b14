"""What a stage container is: the body of `POST /containers/create`, as a pure function, and its labels read back.

The socket proxy (`deploy/`) lets pass only bodies of this shape, so that whoever reaches the proxy can start stages and nothing
else: no privileges, no root, a read-only file system, one read-only mount, limits on cores, memory and processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.runtimes.driver import Launch
from orchestrator.runtimes.records import Record

USER = "10001:10001"
PORT = 8000
MODELS = "/models"
"""Where the models lie in the container."""
PIDS_LIMIT = 256
LOG_SIZE, LOG_FILES = "10m", "2"
SHARES_PER_CORE, LEAST_SHARES = 1024, 2
NANO = 1_000_000_000
PREFIX = "espalier."
SCOPE = f"{PREFIX}scope"
"""The label that says whose a container is."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Where stage containers belong and what they are made from."""

    scope: str
    """Ours are the containers that carry it as a label, and no others: the compose project, or a name made for the state."""
    testbed: str
    image: str
    gpu_image: str
    """For services that ask for GPUs."""
    network: str
    models: str
    """A volume, or an absolute path on the engine's machine."""
    project: str | None = None
    """The Compose project they are to be part of, if any."""
    url: str | None = None
    """The engine's address; None: from DOCKER_HOST, or the socket of this machine."""

    @property
    def binds(self) -> bool:
        """Whether the models come from a path and not from a volume."""
        return self.models.startswith("/")

    def image_for(self, launch: Launch) -> str:
        """The image that replicas of a service are made from."""
        return self.gpu_image if launch.gpus else self.image


@dataclass(frozen=True, slots=True)
class Marks:
    """What the labels of a container say of it."""

    testbed: str
    service: str
    replica: str
    node: str
    generation: int
    specification: str

    @property
    def labels(self) -> dict[str, str]:
        """As labels, without the scope."""
        return {
            f"{PREFIX}testbed": self.testbed,
            f"{PREFIX}service": self.service,
            f"{PREFIX}replica": self.replica,
            f"{PREFIX}node": self.node,
            f"{PREFIX}generation": str(self.generation),
            f"{PREFIX}specification": self.specification,
        }


def read(labels: Mapping[str, str]) -> Marks | None:
    """The marks of a container; None where they are not ours or not whole."""
    try:
        words = {name: labels[PREFIX + name] for name in ("testbed", "service", "replica", "node", "specification")}
        return Marks(**words, generation=int(labels[f"{PREFIX}generation"]))
    except (KeyError, ValueError):
        return None


def name_of(options: EngineOptions, replica: str) -> str:
    """A container's name."""
    return f"{options.scope}-{replica}"


def body(options: EngineOptions, record: Record, launch: Launch, image: str) -> dict[str, Any]:
    """The body of `POST /containers/create` for one replica, made from an image of this id."""
    marks = Marks(options.testbed, record.service, record.id, record.node, record.generation, record.specification)
    return {
        "Image": image,
        "Cmd": [
            *("--model", f"{MODELS}/{launch.model}", *launch.options),
            *("--replica", record.id, "--node", record.node, "--host", "0.0.0.0", "--port", str(PORT)),
        ],
        "User": USER,
        "Labels": {SCOPE: options.scope, **marks.labels, **_compose_labels(options, record.id)},
        "StopSignal": "SIGTERM",
        "HostConfig": _host_config(options, launch),
    }


def _host_config(options: EngineOptions, launch: Launch) -> dict[str, Any]:
    mount = {
        "Type": "bind" if options.binds else "volume", "Source": options.models, "Target": MODELS, "ReadOnly": True,
    }  # fmt: skip
    config: dict[str, Any] = {
        "NetworkMode": options.network,
        "Mounts": [mount],
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Init": True,
        "NanoCpus": round(launch.cpu_limit * NANO),
        "CpuShares": max(LEAST_SHARES, round(launch.cpus * SHARES_PER_CORE)),
        "Memory": launch.memory_bytes,
        "MemorySwap": launch.memory_bytes,
        "PidsLimit": PIDS_LIMIT,
        "Tmpfs": {"/tmp": "rw,noexec,nosuid,size=64m"},
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "json-file", "Config": {"max-size": LOG_SIZE, "max-file": LOG_FILES}},
    }
    if launch.gpus:
        config["DeviceRequests"] = [{"Driver": "nvidia", "Count": launch.gpus, "Capabilities": [["gpu"]]}]
    return config


def _compose_labels(options: EngineOptions, replica: str) -> dict[str, str]:
    """Compose's own labels, so that `docker compose down` takes our containers away with the rest."""
    if options.project is None:
        return {}
    number = re.search(r"\d+$", replica)
    return {
        "com.docker.compose.project": options.project,
        "com.docker.compose.service": "stage",
        "com.docker.compose.container-number": number[0] if number else "1",
        "com.docker.compose.oneoff": "False",
    }


@dataclass(frozen=True, slots=True)
class Seen:
    """A container as the engine lists it."""

    id: str
    name: str
    state: str
    """created, running, paused, exited, …"""
    address: str
    """On the stages' network; empty while it has none."""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self.state in ("running", "paused")

    @property
    def url(self) -> str:
        """Where the stage in it listens; empty while it has no address."""
        return f"http://{self.address}:{PORT}" if self.address else ""


def listed(entry: Mapping[str, Any], network: str) -> Seen:
    """One entry of `GET /containers/json`."""
    names = entry.get("Names") or ["/"]
    return Seen(entry["Id"], names[0].lstrip("/"), entry["State"], _address(entry, network), entry.get("Labels") or {})


def inspected(document: Mapping[str, Any], network: str) -> Seen:
    """The document of `GET /containers/{id}/json`."""
    labels = document["Config"].get("Labels") or {}
    return Seen(document["Id"], document["Name"].lstrip("/"), document["State"]["Status"], _address(document, network), labels)


def _address(document: Mapping[str, Any], network: str) -> str:
    networks = (document.get("NetworkSettings") or {}).get("Networks") or {}
    return str((networks.get(network) or {}).get("IPAddress") or "")


def reserved(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a container was given, from its inspection, in the words of a `Record`: for one whose record is lost."""
    config = document["HostConfig"]
    gpus = sum(request.get("Count") or 0 for request in config.get("DeviceRequests") or ())
    return {"cpus": config["CpuShares"] / SHARES_PER_CORE, "memory_bytes": config["Memory"], "gpus": gpus}
