"""A manager of a Swarm for tests, as small as one can be: the calls of `swarm.Manager`, with tasks that are processes here.

Every task is a `fake_stage` on a loopback address of its own, so that a keeper over the swarm driver can be put through the
same as over the others. Times are shorter than a Swarm's; what becomes of a task is as SwarmKit has it: one that may not be
restarted stays ended, a service scaled down has its task told to end and then forgotten, a box that is down keeps what runs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.engine_api import Event, Refused

ROOT = Path(__file__).resolve().parents[3]
IMAGE = "sha256:" + "a" * 64


@dataclass
class FakeStream:
    """Events, which end when the manager is cut off."""

    ended: bool = False

    async def close(self) -> None:
        self.ended = True


@dataclass
class FakeTask:
    id: str
    service: str
    box: str
    address: str
    process: subprocess.Popen[bytes] | None
    state: str = "running"
    desired: str = "running"
    error: str = ""


@dataclass
class FakeManager:
    """`url` as in `swarm.Manager`; `boxes` may be changed by a test, which then calls `tell`."""

    url: str = "fake"
    by_id: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: dict[str, FakeTask] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=lambda: {"fake:1": IMAGE})
    net: dict[str, Any] | None = field(
        default_factory=lambda: {"Driver": "overlay", "IPAM": {"Config": [{"Subnet": "127.0.0.0/8"}]}}
    )
    away: bool = False
    """Whether calls are answered."""
    pending: set[str] = field(default_factory=set)
    """Boxes on which tasks stay pending."""
    scaled: list[tuple[str, int]] = field(default_factory=list)
    _streams: list[tuple[FakeStream, Callable[[Event], None], Callable[[], None]]] = field(default_factory=list)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    def add_box(self, name: str, **labels: str) -> None:
        """A box that is ready."""
        self.by_id[f"box-{name}"] = {
            "ID": f"box-{name}",
            "Spec": {"Labels": dict(labels), "Availability": "active"},
            "Description": {"Hostname": name},
            "Status": {"State": "ready"},
        }

    # --- what a test does to it --------------------------------------------------------------------------------------------

    def lose(self, name: str) -> None:
        """A box is cut off: what runs there goes on, and the Swarm gives it up."""
        self.by_id[f"box-{name}"]["Status"]["State"] = "down"
        for task in self.ran.values():
            if task.box == f"box-{name}":
                task.desired = "shutdown"
        self.tell()

    def find_again(self, name: str) -> None:
        """It is back: what was told to end meanwhile ends now."""
        self.by_id[f"box-{name}"]["Status"]["State"] = "ready"
        for task in list(self.ran.values()):
            if task.box == f"box-{name}" and task.desired != "running":
                self._end(task)
        self.tell()

    def set_availability(self, name: str, availability: str) -> None:
        """As `docker node update --availability` does; `drain` tells tasks to end."""
        self.by_id[f"box-{name}"]["Spec"]["Availability"] = availability
        for task in self.ran.values():
            if availability == "drain" and task.box == f"box-{name}" and task.state == "running":
                task.desired = "shutdown"
                self._signal(task, signal.SIGTERM)
        self.tell()

    def tell(self) -> None:
        """An event of a box."""
        for _, hear, _ in self._streams:
            hear({"Type": "node", "Action": "update"})

    def cut(self) -> None:
        """It does not answer any more."""
        self.away = True
        for stream, _, over in self._streams:
            stream.ended = True
            over()
        self._streams.clear()

    def task_of(self, replica: str) -> FakeTask:
        """The task of a replica."""
        named = {service["Spec"]["Labels"]["espalier.replica"]: i for i, service in self.made.items()}
        return next(task for task in self.ran.values() if task.service == named[replica])

    def running(self) -> list[FakeTask]:
        """Tasks whose process is there."""
        return [task for task in self.ran.values() if task.process is not None and task.process.poll() is None]

    def end_all(self) -> None:
        """Nothing is left."""
        for task in self.running():
            self._end(task)

    # --- swarm.Manager -----------------------------------------------------------------------------------------------------

    async def connect(self) -> str:
        self._check()
        return "1.41"

    async def image(self, name: str) -> str | None:
        self._check()
        return self.images.get(name)

    async def has_image(self, image: str) -> bool:
        self._check()
        return image in self.images.values()

    async def network(self, name: str) -> dict[str, Any] | None:
        self._check()
        return self.net

    async def boxes(self) -> list[dict[str, Any]]:
        self._check()
        return list(self.by_id.values())

    async def services(self, label: str) -> list[dict[str, Any]]:
        self._check()
        key, _, value = label.partition("=")
        return [service for service in self.made.values() if service["Spec"]["Labels"].get(key) == value]

    async def tasks(self, label: str) -> list[dict[str, Any]]:
        self._check()
        for task in list(self.ran.values()):
            self._look(task)
        return [self._entry(task) for task in self.ran.values()]

    async def create_service(self, body: Mapping[str, Any]) -> str:
        self._check()
        if any(service["Spec"]["Name"] == body["Name"] for service in self.made.values()):
            raise Refused(409, "name conflicts with an existing object")
        service = f"service-{next(self._numbers)}"
        self.made[service] = {"ID": service, "Spec": dict(body)}
        self._begin(service, body)
        return service

    async def scale_service(self, service: str, replicas: int) -> None:
        self._check()
        if service not in self.made:
            raise Refused(404, f"service {service} not found")
        self.made[service]["Spec"]["Mode"] = {"Replicated": {"Replicas": replicas}}
        self.scaled.append((service, replicas))
        self._tell_to_end(service)

    async def remove_service(self, service: str) -> None:
        self._check()
        if self.made.pop(service, None) is None:
            raise Refused(404, f"service {service} not found")
        self._tell_to_end(service)

    async def last_lines(self, service: str, lines: int, /) -> str:
        self._check()
        return "what it wrote\n"

    async def events(
        self, filters: Mapping[str, list[str]], hear: Callable[[Event], None], over: Callable[[], None]
    ) -> FakeStream:
        self._check()
        stream = FakeStream()
        self._streams.append((stream, hear, over))
        return stream

    def close(self) -> None:
        """Nothing to let go of."""

    # --- within ------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.away:
            raise Unreachable("the engine at fake does not answer")

    def _begin(self, service: str, body: Mapping[str, Any]) -> None:
        number = next(self._numbers)
        (constraint,) = body["TaskTemplate"]["Placement"]["Constraints"]
        key, _, value = constraint.partition("==")
        box = next(i for i, each in self.by_id.items() if value == _named(each, key))
        pid = os.getpid()
        address = f"127.{1 + pid % 250}.{1 + pid // 250 % 250}.{1 + number % 250}"
        task = FakeTask(f"task-{number}", service, box, address, None)
        self.ran[task.id] = task
        if box in self.pending or self.by_id[box]["Status"]["State"] != "ready":
            task.state, task.error = "pending", "no suitable node"
            return
        arguments = [word if word != "0.0.0.0" else address for word in body["TaskTemplate"]["ContainerSpec"]["Args"]]
        task.process = subprocess.Popen(
            [sys.executable, "-m", "tests.orchestrator.fake_stage", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL
        )

    def _tell_to_end(self, service: str) -> None:
        for task in list(self.ran.values()):
            if task.service == service:
                task.desired = "remove"
                if self.by_id[task.box]["Status"]["State"] == "ready":
                    self._signal(task, signal.SIGTERM)
                    self._look(task)

    def _look(self, task: FakeTask) -> None:
        """What has become of a task, as far as its box is heard of."""
        if task.process is None or self.by_id[task.box]["Status"]["State"] != "ready":
            return
        grace_s = (
            self.made[task.service]["Spec"]["TaskTemplate"]["ContainerSpec"]["StopGracePeriod"] / 1e9
            if (task.service in self.made)
            else 0.0
        )
        if task.desired != "running" and task.state == "running":
            # The box waits for the grace time; here the wait is taken at once, and it is short in every test.
            try:
                task.process.wait(min(grace_s, 1.5))
            except subprocess.TimeoutExpired:
                task.process.kill()
                task.process.wait()
        code = task.process.poll()
        if code is None:
            return
        if task.desired == "remove":
            self.ran.pop(task.id, None)
        elif task.state == "running":
            task.state, task.error = ("shutdown" if task.desired == "shutdown" else "failed"), f"non-zero exit ({code})"

    def _end(self, task: FakeTask) -> None:
        if task.process is not None:
            task.process.kill()
            task.process.wait()
        self._look(task)

    def _signal(self, task: FakeTask, number: int) -> None:
        if task.process is not None:
            with contextlib.suppress(ProcessLookupError):
                task.process.send_signal(number)

    def _entry(self, task: FakeTask) -> dict[str, Any]:
        status: dict[str, Any] = {"State": task.state, "Err": task.error}
        if task.process is not None:
            status["ContainerStatus"] = {"ContainerID": f"container-{task.id}", "ExitCode": task.process.returncode or 0}
        network = {"Network": {"ID": "n", "Spec": {"Name": "fake"}}, "Addresses": [f"{task.address}/24"]}
        return {
            "ID": task.id, "ServiceID": task.service, "NodeID": task.box, "DesiredState": task.desired, "Status": status,
            "NetworksAttachments": [network] if task.state != "pending" else [],
        }  # fmt: skip


def _named(box: Mapping[str, Any], key: str) -> str | None:
    if key == "node.hostname":
        return str(box["Description"]["Hostname"])
    found: str | None = box["Spec"]["Labels"].get(key.removeprefix("node.labels."))
    return found
