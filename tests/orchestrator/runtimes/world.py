"""A small world for the runtimes' tests: two nodes, a service of fake stages, and both drivers, with what a test does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self
from urllib.parse import urlsplit

import docker
import docker.errors
import psutil

from orchestrator.core import Node, Placement, Replica, Service
from orchestrator.runtimes import child as children
from orchestrator.runtimes.containers import SCOPE, EngineOptions
from orchestrator.runtimes.driver import Driver, Launch
from orchestrator.runtimes.engine import Engine
from orchestrator.runtimes.keeper import Keeper
from orchestrator.runtimes.pins import Pins
from orchestrator.runtimes.processes import Processes
from orchestrator.runtimes.swarm import Swarm
from tests.engine import own_name
from tests.orchestrator.runtimes.fake_swarm import FakeManager

ROOT = Path(__file__).resolve().parents[3]
NODES = {"a": Node("a", 2.0, 2**30), "b": Node("b", 2.0, 2**30)}
SERVICE = Service("pool", "light", 0.5, 2**26)
LIMIT_S = 30.0


class Noticeboard:
    """Stands for the publisher: keeps every state of the replicas, with its time, and lets a test hold back confirmations."""

    def __init__(self) -> None:
        self.history: list[tuple[float, tuple[Replica, ...]]] = []
        self.allowance: dict[str, int] = {}
        self.patience: dict[str, float] = {}
        """Published last."""
        self.news = asyncio.Event()
        self.confirmed = asyncio.Event()
        self.confirmed.set()

    def publish(self, replicas: Sequence[Replica], allowance: Mapping[str, int], patience: Mapping[str, float]) -> int:
        if not self.history or self.history[-1][1] != tuple(replicas):
            self.history.append((time.monotonic(), tuple(replicas)))
        self.allowance, self.patience = dict(allowance), dict(patience)
        self.news.set()
        self.news = asyncio.Event()
        return len(self.history)

    async def acknowledged(self, version: int, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self.confirmed.wait()
        except TimeoutError:
            return False
        return True

    async def until(self, condition: Callable[[dict[str, list[str]]], bool]) -> tuple[Replica, ...]:
        """Wait until state -> ids, of what is published, is as wanted."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                replicas = self.history[-1][1] if self.history else ()
                if condition(by_state(replicas)):
                    return replicas
                await self.news.wait()


def by_state(replicas: Sequence[Replica]) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {"starting": [], "standby": [], "ready": [], "draining": []}
    for replica in replicas:
        states[replica.state].append(replica.id)
    return states


def pool(ready: dict[str, int], standby: dict[str, int] | None = None, allowance: int = 0) -> Placement:
    return Placement({"pool": ready}, {"pool": standby or {}}, {"pool": allowance})


def launch(stage: str = "pool", grace_s: float = 2.0, generation: int = 0) -> Launch:
    return Launch(
        model="tiny", options=("--stage", stage, "--service", "pool"), drain_grace_s=grace_s, cpus=0.5, cpu_limit=1.0,
        memory_bytes=2**26, generation=generation,
    )  # fmt: skip


class Kind(Protocol):
    """One driver, and what a test does to its replicas behind its back."""

    unrouted_s: float
    """A replica that died is out of the routes within this time: told by an event, not found by looking [s]."""

    def driver(self, state_dir: Path) -> Driver:
        """A new one, over the same machine."""

    def kill(self, keeper: Keeper, replica: str) -> None:
        """End a replica as a crash would."""

    def hang(self, keeper: Keeper, replica: str) -> None:
        """Make a replica stop answering without ending."""

    def runs(self, running: dict[str, int | str]) -> bool:
        """Whether what `Keeper.runs_as` named runs."""

    def left(self) -> int:
        """Replicas and remains of replicas on the machine."""


class ProcessesKind:
    unrouted_s = 0.2

    def driver(self, state_dir: Path) -> Driver:
        return Processes(models_dir=ROOT, module="tests.orchestrator.fake_stage", environment=children.environment(ROOT))

    def kill(self, keeper: Keeper, replica: str) -> None:
        os.kill(int(keeper.runs_as(replica)["pid"]), signal.SIGKILL)

    def hang(self, keeper: Keeper, replica: str) -> None:
        os.kill(int(keeper.runs_as(replica)["pid"]), signal.SIGSTOP)

    def runs(self, running: dict[str, int | str]) -> bool:
        try:
            # What a successor stopped stays a zombie here, since both are this process.
            return psutil.Process(int(running["pid"])).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def left(self) -> int:
        ours = [process for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE]
        return sum("tests.orchestrator.fake_stage" in process.cmdline() for process in ours)


@dataclass
class EngineKind:
    """`options` are those of every driver made here; a test may replace them."""

    engine: docker.APIClient
    image: str
    network: str
    models: str
    options: EngineOptions = field(init=False)
    unrouted_s: float = 1.5

    def __post_init__(self) -> None:
        self.options = EngineOptions(
            scope=own_name(), testbed="small", image=self.image, gpu_image=self.image,
            network=self.network, models=self.models,
        )  # fmt: skip

    def driver(self, state_dir: Path) -> Driver:
        return Engine(self.options, Pins(state_dir / "images.json"))

    def kill(self, keeper: Keeper, replica: str) -> None:
        self.engine.kill(keeper.runs_as(replica)["container"], signal="SIGKILL")

    def hang(self, keeper: Keeper, replica: str) -> None:
        self.engine.pause(keeper.runs_as(replica)["container"])

    def runs(self, running: dict[str, int | str]) -> bool:
        try:
            return bool(self.engine.inspect_container(running["container"])["State"]["Running"])
        except docker.errors.NotFound:
            return False

    def left(self) -> int:
        return len(self.ids())

    def ids(self) -> list[str]:
        """Of all containers of ours, running or not."""
        found = self.engine.containers(all=True, filters={"label": [f"{SCOPE}={self.options.scope}"]})
        return [entry["Id"] for entry in found]

    def inspect(self, keeper: Keeper, replica: str) -> dict[str, object]:
        return dict(self.engine.inspect_container(keeper.runs_as(replica)["container"]))

    def remove_all(self) -> None:
        for container in self.ids():
            with contextlib.suppress(docker.errors.APIError):
                self.engine.remove_container(container, force=True)


@dataclass
class SwarmKind:
    """Over a manager that is a fake (`fake_swarm`): what a real one does is seen by tests/system/test_boxes.py."""

    manager: FakeManager = field(default_factory=FakeManager)
    unrouted_s: float = 1.5

    def __post_init__(self) -> None:
        for node in NODES:
            self.manager.add_box(node)
        self.options = EngineOptions(
            scope=own_name(), testbed="small", image="fake:1", gpu_image="fake:1", network="fake", models="/models"
        )

    def driver(self, state_dir: Path) -> Driver:
        return Swarm(self.options, Pins(state_dir / "images.json"), self.manager)

    def kill(self, keeper: Keeper, replica: str) -> None:
        self._process(replica).kill()

    def hang(self, keeper: Keeper, replica: str) -> None:
        self._process(replica).send_signal(signal.SIGSTOP)

    def _process(self, replica: str) -> subprocess.Popen[bytes]:
        process = self.manager.task_of(replica).process
        assert process is not None
        return process

    def runs(self, running: dict[str, int | str]) -> bool:
        return running["task"] in {task.id for task in self.manager.running()}

    def left(self) -> int:
        return len(self.manager.made) + len(self.manager.running())


def keeper(kind: Kind, tmp_path: Path, board: Noticeboard, how: Launch | None = None, timeout_s: float = 20.0) -> Keeper:
    return Keeper(
        driver=kind.driver(tmp_path), state_dir=tmp_path, launches={"pool": how or launch()}, services={"pool": SERVICE},
        nodes=NODES, routing=board, start_timeout_s=timeout_s,
    )  # fmt: skip


@asynccontextmanager
async def running(
    kind: Kind, tmp_path: Path, how: Launch | None = None, timeout_s: float = 20.0
) -> AsyncIterator[tuple[Keeper, Noticeboard]]:
    """A keeper that has adopted what there was; everything is stopped at the end."""
    board = Noticeboard()
    kept = keeper(kind, tmp_path, board, how, timeout_s)
    await kept.adopt()
    try:
        yield kept, board
    finally:
        await kept.stop_all()


@asynccontextmanager
async def left_running(
    kind: Kind, tmp_path: Path, desired: Placement, how: Launch | None = None
) -> AsyncIterator[dict[str, dict[str, int | str]]]:
    """What a predecessor left: replica -> what it runs as."""
    board = Noticeboard()
    before = keeper(kind, tmp_path, board, how)
    await before.adopt()
    before.apply(desired)
    ready, standby = desired.target("pool").replicas, desired.target("pool").standby
    replicas = await board.until(lambda s: (len(s["ready"]), len(s["standby"])) == (ready, standby))
    named = {r.id: before.runs_as(r.id) for r in replicas}
    await before.leave()
    yield named


class Relay:
    """A wire to the engine that a test can cut and mend; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def mend(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, self._path)

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
        self._path.unlink(missing_ok=True)
        for end in self._ends:
            end.transport.abort()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.create_task(self._relay(reader, writer))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = urlsplit(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
        self._ends.add(writer)
        if address.scheme == "unix":
            far_reader, far_writer = await asyncio.open_unix_connection(address.path)
        else:
            far_reader, far_writer = await asyncio.open_connection(address.hostname, address.port)
        self._ends.add(far_writer)
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
        self._ends -= {writer, far_writer}


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
