"""Three real engines on this machine, joined to one Swarm, with a testbed deployed over them as a user would do it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine import give_up
from tests.system.edge import Served, until
from tests.system.engine import ROOT

TESTBED = Path(__file__).with_name("boxes.yaml")
STACK = "boxed"
TAG = os.environ.get("ESPALIER_TAG", "0.1.0")
"""Of the images, as Docker Compose has it."""
UP_S, READY_S, DOWN_S = 300.0, 120.0, 300.0
"""Limits of bringing boxes and testbed up, and of removing what the boxes have written, on a busy disk [s]."""

LOST_S = 60.0
"""A Swarm gives a box up after 13 s; with the grace, and starts elsewhere [s]."""
ON_REQUEST = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.environ.get("ESPALIER_TEST_BOXES") != "1", reason="make test-boxes"),
]
"""Marks of tests on boxes."""


class Failed(AssertionError):
    """A command of the boxes did not succeed."""


@dataclass
class Boxes(Served):
    """`deploy/local-boxes` with a stack on it. `asked` is a box that is a manager and is not lost; `url` is its gateway."""

    home: Path
    models: Path
    managers: int = 1
    orchestrators: int = 1
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        # Few letters: a set's name is in the path of its engines' sockets.
        self.environment = {"ESPALIER_BOXES": f"t{os.getpid()}", "ESPALIER_BOXES_NET": "192.168.214"}
        self.addresses: dict[str, str] = {}
        self.sockets: dict[str, str] = {}
        self.asked, self.stack = "box-1", STACK

    def script(self, *arguments: str, limit_s: float = 60.0) -> str:
        """A command of `deploy/local-boxes`; its standard output."""
        environment = {**os.environ, **self.environment}
        done = subprocess.run(
            ["deploy/local-boxes", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"local-boxes {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def container(self, box: str) -> str:
        """The box itself, a container of this machine's engine."""
        return f"espalier-{self.environment['ESPALIER_BOXES']}-{box}"

    def docker(self, *arguments: str) -> str:
        """Docker, on a manager; its standard output."""
        return self.on(self.asked, *arguments)

    def on(self, box: str, *arguments: str) -> str:
        """Docker, on one box; its standard output."""
        return self.script("docker", box, *arguments).strip()

    def up(self) -> None:
        """Three boxes, and the stack on them, until every pipeline is served."""
        try:
            self.grow(3)
        except Failed as failed:
            give_up(f"no boxes can be had here: {failed}")
        self.deploy(TESTBED, STACK)

    def deploy(self, testbed: Path, stack: str) -> None:
        """A testbed as a stack of that name, until every pipeline is served."""
        self.stack, file = stack, self.home / f"{stack}.stack.yaml"
        options = ("--name", stack, "--models", "/models", "--tag", TAG, "--orchestrators", str(self.orchestrators))
        self._run(sys.executable, "-m", "orchestrator", "render", "stack", str(testbed), *options, "--out", str(file))
        deploy = ("docker", "stack", "deploy", "--detach=true", "--resolve-image", "never", "-c", str(file), stack)
        self._run(*deploy, DOCKER_HOST=f"unix://{self.sockets[self.asked]}")
        until(self.is_ready, "the testbed is ready on the boxes", READY_S)

    def remove(self) -> None:
        """The stack goes, and its stages with it."""
        self.docker("stack", "rm", self.stack)
        until(
            lambda: not self.stages() and not self.docker("network", "ls", "-q", "-f", f"name={self.stack}_"),
            "it is gone",
            LOST_S,
        )

    def grow(self, number: int) -> None:
        """So many boxes, with those that there are."""
        options = ("--managers", str(self.managers), "--models", str(self.models))
        for line in self.script("up", str(number), *options, limit_s=UP_S).splitlines():
            name, _, address, _, socket = line.split()
            self.addresses[name], self.sockets[name] = address, socket
        self.ask(self.asked)

    def ask(self, box: str) -> None:
        """From now on send commands and tasks to this box, a manager."""
        self.asked, self.url = box, f"http://{self.addresses[box]}:8080"

    def is_ready(self) -> bool:
        """Whether all is as wanted, and the gateway serves."""
        with contextlib.suppress(Failed):
            return bool(self.status()["ready"]) and self.answers(self.asked)
        return False

    def answers(self, box: str) -> bool:
        """Whether the gateway of a box answers a task."""
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a tree"]}]}
        try:
            url = f"http://{self.addresses[box]}:8080/v2/models/embed/infer"
            return httpx.post(url, json=body, trust_env=False, timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def espalier(self, command: str, *arguments: str) -> str:
        """A command on the control plane, from the container of the orchestrator that leads; its standard output."""
        return self.on(*self.leading(), "espalier", command, *arguments, "--url", "http://127.0.0.1:8090")

    def leading(self) -> tuple[str, str, str]:
        """The box of the orchestrator that leads, and what runs a command in its container."""
        for box, container in self.controls().items():
            with contextlib.suppress(Failed):
                self.on(box, "exec", container, "espalier", "status", "--url", "http://127.0.0.1:8090")
                return box, "exec", container
        raise Failed("no orchestrator leads")

    def controls(self) -> dict[str, str]:
        """Containers of orchestrators, whether they lead or wait, by box."""
        found = {}
        for box in self.addresses:
            with contextlib.suppress(Failed):
                label = f"label=com.docker.swarm.service.name={self.stack}_orchestrator"
                for container in self.on(box, "ps", "--quiet", "--filter", label).split():
                    found[box] = container
        return found

    def update(self, testbed: str) -> None:
        """Give the testbed another file, as whoever runs it would: by a container beside the stack."""
        Path(self.sockets[self.asked]).with_name("testbed.yaml").write_text(testbed)
        image = ("--entrypoint", "espalier", f"espalier/orchestrator:{TAG}")
        self.script(
            "docker", self.asked, "run", "--rm", "--network", f"{self.stack}_default", "--volume", "/run/box:/given:ro", *image,
            "up", "/given/testbed.yaml", "--url", "http://orchestrator:8090", "--models-dir", "/given", "--limit", "120",
            limit_s=150.0,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """What `espalier status` knows."""
        found: dict[str, Any] = json.loads(self.espalier("status", "-o", "json"))
        return found

    def settle(self, limit_s: float = READY_S) -> None:
        """Wait until everything is as wanted."""
        until(
            lambda: all(service["settled"] for service in self.status()["services"].values()), "all is as wanted", limit_s
        )  # fmt: skip

    def nodes(self, service: str) -> Counter[str]:
        """Ready replicas of a service by node."""
        replicas = self.status()["services"][service]["replicas"]
        return Counter(replica["node"] for replica in replicas if replica["state"] == "ready")

    def stages(self) -> dict[str, str]:
        """Containers of stages that run, whatever anybody thinks should, and the box of each."""
        found = {}
        for box in self.addresses:
            with contextlib.suppress(Failed):
                found.update(dict.fromkeys(self.on(box, "ps", "--quiet", "--filter", "label=espalier.replica").split(), box))
        return found

    def down(self) -> None:
        """No box is left."""
        self.script("down", limit_s=DOWN_S)

    def left(self) -> list[str]:
        """What there is of the boxes on this machine's engine."""
        label = f"label=espalier.boxes={self.environment['ESPALIER_BOXES']}"
        found = [self._run("docker", "ps", "--all", "--quiet", "--filter", label)]
        return [*found[0].split(), *self._run("docker", "network", "ls", "--quiet", "--filter", label).split()]

    def _run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise Failed(f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout


@contextmanager
def boxed(home: Path, models: Path, managers: int = 1, orchestrators: int = 1) -> Iterator[Boxes]:
    """Boxes and testbed, up; afterwards everything of them is gone, whatever a test did."""
    boxes = Boxes(home, models, managers, orchestrators)
    try:
        boxes.up()
        yield boxes
    finally:
        boxes.down()
    assert boxes.left() == [], "local-boxes down left something"
