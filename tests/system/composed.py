"""A whole project of Docker Compose for the system tests, driven from the host."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from orchestrator.__main__ import main
from tests.engine import own_name
from tests.system.edge import PATIENCE_S, Served, until
from tests.system.engine import LIMIT_S, docker, labelled

TESTBED = Path(__file__).with_name("composed.yaml")


@dataclass
class Composed(Served):
    """`docker compose up` of the project's own file, under a name and on ports of its own."""

    project: str = field(default_factory=own_name)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        ports = dict(zip(("ESPALIER_PORT", "ESPALIER_CONTROL_PORT", "ESPALIER_PROMETHEUS_PORT"), free_ports(3), strict=True))
        self.environment = {name: str(port) for name, port in ports.items()} | {
            "COMPOSE_PROJECT_NAME": self.project,
            "ESPALIER_TESTBED": str(TESTBED),
            "ESPALIER_BIND": "127.0.0.1",
        }
        self.url = f"http://127.0.0.1:{ports['ESPALIER_PORT']}"
        self.control = f"http://127.0.0.1:{ports['ESPALIER_CONTROL_PORT']}"

    def compose(self, *arguments: str) -> str:
        """`docker compose` on this project."""
        return docker("compose", "--progress", "quiet", *arguments, environment=self.environment)

    def espalier(self, command: str, *arguments: str) -> str:
        """A command on its control plane, from the host; its standard output."""
        result = CliRunner().invoke(main, [command, *arguments, "--url", self.control])
        assert result.exit_code == 0, result.output
        return result.stdout

    def status(self) -> dict[str, Any]:
        """What `espalier status` knows."""
        found: dict[str, Any] = json.loads(self.espalier("status", "-o", "json"))
        return found

    def want(self, **replicas: int) -> None:
        """Bring it to so many replicas of each service, wait until it is so, and until the gateway knows."""
        for service, count in replicas.items():
            if self.status()["services"][service]["wanted"]["ready"] != count:
                self.espalier("scale", service, str(count))
        until(lambda: all(service["settled"] for service in self.status()["services"].values()), "everything is as wanted", 60)
        version = self.status()["version"]
        until(lambda: self.gauge("espalier_gateway_routes_version") == version, "the gateway knows it")

    def replicas(self, service: str | None = None) -> dict[str, str]:
        """Container of every replica, or of a service's."""
        services = self.status()["services"]
        found = [r for name, s in services.items() for r in s["replicas"] if service in (None, name)]
        return {replica["id"]: replica["container"] for replica in found}

    def container(self, service: str) -> str:
        """Container of one of the services of the compose file."""
        (found,) = self.compose("ps", "--all", "--quiet", service).split()
        return found

    def left(self) -> dict[str, list[str]]:
        """What there is of the project on the engine."""
        label = f"label=com.docker.compose.project={self.project}"
        return {
            "containers": docker("ps", "--all", "--quiet", "--filter", label).split(),
            "networks": docker("network", "ls", "--quiet", "--filter", label).split(),
            "volumes": docker("volume", "ls", "--quiet", "--filter", label).split(),
        }


@contextmanager
def composed() -> Iterator[Composed]:
    """The project, up; afterwards everything of it is gone, whatever a test did."""
    project = Composed()
    try:
        project.compose("up", "--detach", "--quiet-pull")
        until(lambda: bool(project.status()["ready"]), "the testbed is ready", LIMIT_S)
        until(lambda: project.gauge("espalier_gateway_routes_version") > 0, "the gateway answers", PATIENCE_S)
        yield project
    finally:
        project.compose("--profile", "*", "down", "--volumes", "--timeout", "5")
        stray = labelled(f"com.docker.compose.project={project.project}")
        if stray:
            docker("rm", "--force", *stray)


def free_ports(count: int) -> list[int]:
    """Ports that nobody has at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
