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

from tests.engine import give_up
from tests.system.edge import Served, until
from tests.system.engine import ROOT

TESTBED = Path(__file__).with_name("boxes.yaml")
STACK = "boxed"
TAG = os.environ.get("ESPALIER_TAG", "0.1.0")
"""Of the images, as Docker Compose has it."""
UP_S, READY_S, DOWN_S = 300.0, 120.0, 300.0
"""Limits of bringing boxes and testbed up, and of removing what the boxes have written, on a busy disk [s]."""


class Failed(AssertionError):
    """A command of the boxes did not succeed."""


@dataclass
class Boxes(Served):
    """`deploy/local-boxes` with a stack on it. `url` is the gateway of box-1, which is the manager and is never lost here."""

    home: Path
    models: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        # Few letters: a set's name is in the path of its engines' sockets.
        self.environment = {"ESPALIER_BOXES": f"t{os.getpid()}", "ESPALIER_BOXES_NET": "192.168.214"}
        self.addresses: dict[str, str] = {}
        self.manager = ""

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

    def docker(self, *arguments: str) -> str:
        """Docker, on the manager; its standard output."""
        return self.script("docker", "box-1", *arguments).strip()

    def up(self) -> None:
        """Three boxes, and the stack on them, until every pipeline is served."""
        try:
            said = self.script("up", "3", "--models", str(self.models), limit_s=UP_S)
        except Failed as failed:
            give_up(f"no boxes can be had here: {failed}")
        lines = [line.split() for line in said.splitlines()]
        self.addresses = {name: address for name, _, address, *_ in lines}
        self.manager = f"unix://{lines[0][-1]}"
        self.url = f"http://{self.addresses['box-1']}:8080"
        stack = self.home / "stack.yaml"
        self._run(
            sys.executable,
            "-m",
            "orchestrator",
            "render",
            "stack",
            str(TESTBED),
            "--name",
            STACK,
            "--models",
            "/models",
            "--tag",
            TAG,
            "--out",
            str(stack),
        )
        deploy = ("docker", "stack", "deploy", "--detach=true", "--resolve-image", "never", "-c", str(stack), STACK)
        self._run(*deploy, DOCKER_HOST=self.manager)
        until(self.is_ready, "the testbed is ready on the boxes", READY_S)

    def is_ready(self) -> bool:
        """Whether all is as wanted, and box-1's gateway serves."""
        with contextlib.suppress(Failed):
            return bool(self.status()["ready"]) and self.answers("box-1")
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
        """A command on the control plane, from the orchestrator's own container; its standard output."""
        label = f"label=com.docker.swarm.service.name={STACK}_orchestrator"
        (container, *_) = self.docker("ps", "--quiet", "--filter", label).split() or [""]
        return self.docker("exec", container, "espalier", command, *arguments, "--url", "http://127.0.0.1:8090")

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

    def stages(self) -> Counter[str]:
        """Containers of stages that run, by box, whatever anybody thinks should."""
        found = Counter[str]()
        for box in self.addresses:
            with contextlib.suppress(Failed):
                said = self.script("docker", box, "ps", "--quiet", "--filter", "label=espalier.replica")
                found[box] = len(said.split())
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
def boxed(home: Path, models: Path) -> Iterator[Boxes]:
    """Boxes and testbed, up; afterwards everything of them is gone, whatever a test did."""
    boxes = Boxes(home, models)
    try:
        boxes.up()
        yield boxes
    finally:
        boxes.down()
    assert boxes.left() == [], "local-boxes down left something"
