"""What a stage is in a Swarm: the body of `POST /services/create` as a pure function, and tasks and boxes read back.

Every replica is a Swarm service of its own with one task, or none: Swarm's choice which of a service's tasks goes when it is
scaled down would be in the way of draining one replica. A task that has ended stays ended, since the keeper sees to starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.runtimes.containers import (
    LOG_FILES,
    LOG_SIZE,
    MODELS,
    NANO,
    PIDS_LIMIT,
    PORT,
    PREFIX,
    SCOPE,
    USER,
    EngineOptions,
    Marks,
    name_of,
)
from orchestrator.runtimes.driver import Absence, Launch
from orchestrator.runtimes.records import Record

CPUS = f"{PREFIX}cpus"
"""The label of a service with the cores that placement reserves for it; a Swarm has no word for them."""
NODE = f"{PREFIX}node"
"""The label of a box that says which node of the testbed it is; one without it is the node of its host name."""
STACK = "com.docker.stack.namespace"
"""Docker's own label: `docker stack rm` takes away every service that carries it."""
KILL_MARGIN_S = 1.0
"""Between the grace time that a replica keeps itself and the engine's SIGKILL [s]."""
TMPFS_BYTES, TMPFS_MODE = 64 << 20, 0o1777
GPU = "NVIDIA-GPU"
"""Kind of the generic resource that an engine announces for each of its GPUs (`node-generic-resources`)."""
OVER = frozenset({"complete", "shutdown", "failed", "rejected", "orphaned", "remove"})
"""States from which a task never comes back."""


def body(options: EngineOptions, record: Record, launch: Launch, image: str, constraint: str) -> dict[str, Any]:
    """The body of `POST /services/create` for one replica, made from an image of this id on the box of a constraint."""
    marks = Marks(options.testbed, record.service, record.id, record.node, record.generation, record.specification)
    stack = {} if options.project is None else {STACK: options.project}
    labels = {SCOPE: options.scope, **marks.labels, CPUS: f"{launch.cpus:g}", **stack}
    return {
        "Name": name_of(options, record.id),
        "Labels": labels,
        "TaskTemplate": {
            "ContainerSpec": _container(options, record, launch, image, labels),
            "Resources": _resources(launch),
            "RestartPolicy": {"Condition": "none"},
            "Placement": {"Constraints": [constraint]},
            "Networks": [{"Target": options.network}],
            "LogDriver": {"Name": "json-file", "Options": {"max-size": LOG_SIZE, "max-file": LOG_FILES}},
        },
        "Mode": {"Replicated": {"Replicas": 1}},
        # No virtual address: whoever sends knows the task's own.
        "EndpointSpec": {"Mode": "dnsrr"},
    }


def _container(options: EngineOptions, record: Record, launch: Launch, image: str, labels: Mapping[str, str]) -> dict[str, Any]:
    kind = "bind" if options.binds else "volume"
    return {
        "Image": image,
        "Args": [
            *("--model", f"{MODELS}/{launch.model}", *launch.options),
            *("--replica", record.id, "--node", record.node, "--host", "0.0.0.0", "--port", str(PORT)),
        ],
        "User": USER,
        "Labels": dict(labels),
        "StopSignal": "SIGTERM",
        "StopGracePeriod": round((launch.drain_grace_s + KILL_MARGIN_S) * NANO),
        "Init": True,
        "ReadOnly": True,
        "CapabilityDrop": ["ALL"],
        "Mounts": [
            {"Type": kind, "Source": options.models, "Target": MODELS, "ReadOnly": True},
            {"Type": "tmpfs", "Target": "/tmp", "TmpfsOptions": {"SizeBytes": TMPFS_BYTES, "Mode": TMPFS_MODE}},
        ],
    }


def _resources(launch: Launch) -> dict[str, Any]:
    """Limits. Nothing is reserved but GPUs, which an engine hands out: how full a box may be is placement's business."""
    limits = {"NanoCPUs": round(launch.cpu_limit * NANO), "MemoryBytes": launch.memory_bytes, "Pids": PIDS_LIMIT}
    if not launch.gpus:
        return {"Limits": limits}
    gpus = {"DiscreteResourceSpec": {"Kind": GPU, "Value": launch.gpus}}
    return {"Limits": limits, "Reservations": {"GenericResources": [gpus]}}


@dataclass(frozen=True, slots=True)
class Deployed:
    """One of our services as a Swarm lists it."""

    id: str
    name: str
    labels: Mapping[str, str]
    replicas: int
    template: Mapping[str, Any]

    @property
    def reserved(self) -> dict[str, Any]:
        """What it was given, in the words of a `Record`: for a replica whose record is lost."""
        resources = self.template.get("Resources") or {}
        generic = (resources.get("Reservations") or {}).get("GenericResources") or ()
        gpus = sum((each.get("DiscreteResourceSpec") or {}).get("Value") or 0 for each in generic)
        limits = resources.get("Limits") or {}
        return {"cpus": float(self.labels.get(CPUS, 0)), "memory_bytes": limits.get("MemoryBytes", 0), "gpus": gpus}


def deployed(entry: Mapping[str, Any]) -> Deployed:
    """One entry of `GET /services`."""
    spec = entry["Spec"]
    replicas = ((spec.get("Mode") or {}).get("Replicated") or {}).get("Replicas", 0)
    return Deployed(entry["ID"], spec["Name"], spec.get("Labels") or {}, replicas, spec.get("TaskTemplate") or {})


@dataclass(frozen=True, slots=True)
class Task:
    """A task as a Swarm lists it."""

    id: str
    service: str
    """Id of its service."""
    box: str
    """Id of the box that it is on; empty while it has none."""
    state: str
    """new, pending, assigned, preparing, starting, running, complete, failed, …"""
    desired: str
    address: str
    """On the stages' network; empty while it has none."""
    exit_code: int | None
    error: str
    """What kept it from running, or what ended it."""

    @property
    def over(self) -> bool:
        """Whether it has ended, or will never run."""
        return self.state in OVER

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self.state == "running"

    @property
    def told_to_end(self) -> bool:
        """Whether a Swarm has told it to end; it also says so of one that failed, which ended by itself."""
        return self.desired in ("shutdown", "remove") and self.state in ("running", "shutdown")

    @property
    def url(self) -> str:
        """Where the stage in it listens; empty while it has no address."""
        return f"http://{self.address}:{PORT}" if self.address else ""


def task(entry: Mapping[str, Any], network: str) -> Task:
    """One entry of `GET /tasks`."""
    status = entry.get("Status") or {}
    container = status.get("ContainerStatus") or {}
    return Task(
        id=entry["ID"],
        service=entry.get("ServiceID", ""),
        box=entry.get("NodeID", ""),
        state=status.get("State", "new"),
        desired=entry.get("DesiredState", ""),
        address=_address(entry, network),
        # Of one that could not be started nothing ended.
        exit_code=container.get("ExitCode") if container.get("ContainerID") else None,
        error=status.get("Err", ""),
    )


def _address(entry: Mapping[str, Any], network: str) -> str:
    for attached in entry.get("NetworksAttachments") or ():
        if network in (attached["Network"]["Spec"].get("Name"), attached["Network"].get("ID")):
            return str(next(iter(attached.get("Addresses") or ()), "")).partition("/")[0]
    return ""


@dataclass(frozen=True, slots=True)
class Box:
    """A machine of a Swarm."""

    id: str
    hostname: str
    label: str | None
    state: str
    """ready, down, unknown or disconnected."""
    availability: Literal["active", "pause", "drain"]

    @property
    def node(self) -> str:
        """The node of the testbed that it is."""
        return self.label or self.hostname

    @property
    def constraint(self) -> str:
        """What pins a task to it."""
        return f"node.hostname=={self.hostname}" if self.label is None else f"node.labels.{NODE}=={self.label}"

    @property
    def absence(self) -> Absence | None:
        """Why nothing may be started on it."""
        # One whose state is `unknown` has a new leader that has not heard of it yet; what it runs goes on.
        if self.state in ("down", "disconnected"):
            return "down"
        return None if self.availability == "active" else "leaving"


def box(entry: Mapping[str, Any]) -> Box:
    """One entry of `GET /nodes`."""
    spec, status = entry["Spec"], entry.get("Status") or {}
    return Box(
        id=entry["ID"],
        # One that is just joining has not described itself yet.
        hostname=(entry.get("Description") or {}).get("Hostname", ""),
        label=(spec.get("Labels") or {}).get(NODE),
        state=status.get("State", "unknown"),
        availability=spec.get("Availability", "active"),
    )


def by_node(boxes: Iterable[Box]) -> dict[str, Box]:
    """Boxes by the node of the testbed that they are.

    Where several claim one name, one that is there is taken before one that is not, then the one with the label: a box that was
    replaced leaves its predecessor's entry behind. One without a name is none yet.
    """
    best: dict[str, Box] = {}
    for each in sorted(boxes, key=lambda b: (b.absence == "down", b.label is None, b.id)):
        if each.node:
            best.setdefault(each.node, each)
    return best
