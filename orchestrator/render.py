"""A testbed as a stack file, for `docker stack deploy` on a Docker Swarm. Pure: text in, text out.

In the stack are the parts that stay: the orchestrator and its socket proxies on managers, a gateway on every box or on one, and
Prometheus. The stages are not in it: the orchestrator makes them, under the stack's label, so `docker stack rm` takes them too.
No service here needs a GPU, which `docker stack` would refuse to hear of in compose's words; stages that do are made by the
orchestrator.

Every node of the testbed is the box of that hostname: a template can tell a task its node's hostname, and nothing else of it.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import yaml

from orchestrator.errors import UsageError
from orchestrator.testbed import EVERYWHERE, Loaded

VERSION = importlib.metadata.version("espalier")
CONTROL_PORT, PROXY_PORT, GATEWAY_PORT, PROMETHEUS_PORT = 8090, 2375, 8080, 9090
SOCKET = "/var/run/docker.sock"
TESTBED = "/etc/espalier/testbed.yaml"
HOSTNAME = "{{.Node.Hostname}}"
MANAGERS = "node.role == manager"


@dataclass(frozen=True, slots=True)
class Options:
    """What a stack is told beside its testbed."""

    name: str
    """Of the stack, as in `docker stack deploy -c FILE NAME`."""
    testbed_path: str
    """Of the testbed file, as seen from the stack file."""
    tag: str = VERSION
    """Of the images."""
    models: str | None = None
    """Directory with the exported models, the same on every box; None: the volume `NAME_models` of each box."""
    orchestrators: int = 1
    """How many, each on a manager of its own; all but one wait."""


def stack(loaded: Loaded, options: Options) -> str:
    """The stack file.

    Raises:
        UsageError: the models' directory is no absolute path.
    """
    if options.models is not None and not options.models.startswith("/"):
        raise UsageError(f"--models {options.models}: every box needs the same path, so it must be absolute")
    head = (
        f"# Made from testbed {loaded.testbed.name} by espalier render stack. Each of its nodes is the box of that hostname.\n"
        f"#   docker stack deploy --detach=true --resolve-image never -c FILE {options.name}\n"
    )
    return head + yaml.safe_dump(document(loaded, options), sort_keys=False, width=100)


def document(loaded: Loaded, options: Options) -> dict[str, Any]:
    """The stack file as data; see `stack`."""
    volumes: dict[str, Any] = {"state": {}, "gateway": {}, "prometheus": {}}
    if options.models is None:
        volumes["models"] = {"name": f"{options.name}_models"}
    return {
        "version": "3.9",
        "services": {
            "socket-proxy": _proxy(options),
            "orchestrator": _orchestrator(options),
            "gateway": _gateway(loaded, options),
            "prometheus": _prometheus(options),
        },
        "networks": {
            # Attachable, for whoever measures from a container of his own; the stages' services are attached either way.
            "default": {"driver": "overlay", "attachable": True, "name": f"{options.name}_default"},
            "control": {"driver": "overlay", "internal": True},
        },
        # A config never changes once it is there, so another file is another config.
        "configs": {
            "testbed": {"name": f"{options.name}-testbed-{loaded.sha256[:12]}", "file": options.testbed_path},
        },
        "volumes": volumes,
    }


def _service(image: str, options: Options, memory: str, command: list[str], **more: Any) -> dict[str, Any]:
    """What all services share: no rights, a read-only root, limits, and addresses of tasks instead of a virtual one."""
    deploy = {
        "endpoint_mode": "dnsrr",
        "resources": {"limits": {"memory": memory, "pids": 256}},
        "restart_policy": {"condition": "any", "delay": "1s"},
        **more.pop("deploy", {}),
    }
    return {
        "image": f"espalier/{image}:{options.tag}",
        "command": command,
        "init": True,
        "read_only": True,
        "user": "10001:10001",
        "cap_drop": ["ALL"],
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "2"}},
        "networks": ["default"],
        **more,
        "volumes": [
            {"type": "tmpfs", "target": "/tmp", "tmpfs": {"size": 64 << 20}},
            *more.get("volumes", []),
        ],
        "deploy": deploy,
    }


def _health(port: int, path: str, start: str = "30s") -> dict[str, Any]:
    test = ["CMD", "healthcheck", str(port), path]
    return {"test": test, "interval": "2s", "timeout": "3s", "retries": 5, "start_period": start}


def _volume(source: str, target: str, *, read_only: bool = False) -> dict[str, Any]:
    kind = "bind" if source.startswith("/") else "volume"
    return {"type": kind, "source": source, "target": target, **({"read_only": True} if read_only else {})}


def _proxy(options: Options) -> dict[str, Any]:
    """On every manager, so that the loss of one leaves a way to the engine."""
    images = [f"--image=espalier/{image}:{options.tag}" for image in ("stage", "stage-gpu")]
    return _service(
        "orchestrator", options, "128M",
        [
            f"--listen=0.0.0.0:{PROXY_PORT}", f"--socket={SOCKET}", f"--scope={options.name}", f"--project={options.name}",
            *images, f"--network={options.name}_default", f"--models={options.models or options.name + '_models'}", "--swarm",
        ],
        entrypoint=["python", "-m", "orchestrator.socket_proxy"],
        user="0:0",
        networks=["control"],
        volumes=[_volume(SOCKET, SOCKET, read_only=True)],
        healthcheck=_health(PROXY_PORT, "/_ping"),
        deploy={"mode": "global", "placement": {"constraints": [MANAGERS]}},
    )  # fmt: skip


def _orchestrator(options: Options) -> dict[str, Any]:
    return _service(
        "orchestrator", options, "1G",
        [
            TESTBED, "--state-dir=/state", "--models-dir=/models", "--host=0.0.0.0", f"--port={CONTROL_PORT}",
            "--gateway=announced", f"--prometheus=http://prometheus:{PROMETHEUS_PORT}", "--runtime=swarm",
            f"--engine-image=espalier/stage:{options.tag}", f"--engine-gpu-image=espalier/stage-gpu:{options.tag}",
            f"--engine-network={options.name}_default", f"--engine-models={options.models or options.name + '_models'}",
            f"--engine-project={options.name}", *(["--lease"] if options.orchestrators > 1 else []),
        ],
        environment={"DOCKER_HOST": f"tcp://socket-proxy:{PROXY_PORT}"},
        networks=["default", "control"],
        configs=[{"source": "testbed", "target": TESTBED, "mode": 0o444}],
        volumes=[_volume("state", "/state"), _volume(options.models or "models", "/models", read_only=True)],
        healthcheck=_health(CONTROL_PORT, "/health"),
        stop_grace_period="45s",
        deploy={
            "mode": "replicated", "replicas": options.orchestrators,
            "placement": {"constraints": [MANAGERS], "max_replicas_per_node": 1},
        },
    )  # fmt: skip


def _gateway(loaded: Loaded, options: Options) -> dict[str, Any]:
    """Published in host mode: each box's own port leads to the gateway of that box, so a task begins where it came in."""
    node = loaded.testbed.gateway.node
    if node == EVERYWHERE and node not in loaded.testbed.nodes:
        where: dict[str, Any] = {"mode": "global"}
    else:
        pinned = f"node.hostname == {loaded.testbed.gateway_node}"
        where = {"mode": "replicated", "replicas": 1, "placement": {"constraints": [pinned]}}
    # Given twice where there are two behind the name: then a gateway asks anew sooner, and so meets the other.
    routes = [f"--routes-url=http://orchestrator:{CONTROL_PORT}/v1/routes"] * options.orchestrators
    return _service(
        "gateway", options, "512M",
        ["--host=0.0.0.0", f"--port={GATEWAY_PORT}", *routes, "--routes-file=/state/routes.json"],
        environment={"ESPALIER_NODE": HOSTNAME, "ESPALIER_NAME": f"gateway-{HOSTNAME}"},
        volumes=[_volume("gateway", "/state")],
        ports=[
            {
                "target": GATEWAY_PORT, "published": loaded.testbed.gateway.port or GATEWAY_PORT, "protocol": "tcp",
                "mode": "host",
            }
        ],
        stop_grace_period="15s",
        # It is healthy as soon as it is alive: without an orchestrator, and before the stages are there, it must not be killed.
        healthcheck=_health(GATEWAY_PORT, "/v2/health/live"),
        # Two cannot have one port: the old one goes first.
        deploy={**where, "update_config": {"order": "stop-first", "parallelism": 1, "delay": "5s"}},
    )  # fmt: skip


def _prometheus(options: Options) -> dict[str, Any]:
    return _service(
        "prometheus", options, "1G",
        ["--storage.tsdb.retention.time=24h", f"--web.listen-address=0.0.0.0:{PROMETHEUS_PORT}"],
        volumes=[_volume("prometheus", "/prometheus")],
        healthcheck=_health(PROMETHEUS_PORT, "/-/ready"),
        deploy={"mode": "replicated", "replicas": 1, "placement": {"constraints": [MANAGERS]}},
    )  # fmt: skip
