"""The processes runtime: each replica a local process, nodes being shares of this machine. No Docker.

A process gets its listening socket from us, so its port is known and open before it runs, and a session of its own, so that
it outlives us: a restarted orchestrator takes up what it finds (`adopt`) and disturbs nothing. Every change of state is one
event: written down, published in the routes, and answered by `reconcile`, all before anything else happens. One attendant
coroutine walks with each process: loads, `standby`, then waits for its end. A process that ends unasked is out of the routes
within milliseconds and is started again after a pause (`backoff`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from orchestrator.core import Node, Placement, Replica, Service
from orchestrator.runtimes import child as children
from orchestrator.runtimes.backoff import Backoff
from orchestrator.runtimes.child import Child
from orchestrator.runtimes.reconcile import Change, Start, Step, reconcile
from orchestrator.runtimes.records import Record, Records
from services.dataplane.routes import ReplicaState

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LISTEN_BACKLOG = 1024
READY_POLL_S = 0.05
START_PAUSE_S = 0.01
"""Starting takes some milliseconds of this process; before that, gateways hear what is gone and what is promoted [s]."""
READY_ANSWER_S = 2.0
"""A loading replica may hold a question this long: its socket listens before it does [s]."""
ACKNOWLEDGE_S = 1.0
"""A drain waits this long for gateways to say that they have the routes without the replica [s]."""
DEFAULT_GRACE_S = 10.0
"""For a replica whose service the testbed no longer has [s]."""
STOP_MARGIN_S = 1.0
"""Between the grace time that a replica keeps itself and SIGKILL [s]."""


class Routing(Protocol):
    """Whoever tells the gateways."""

    def publish(self, replicas: Sequence[Replica]) -> int:
        """Make these replicas known; returns the version of the routes that has them."""

    async def acknowledged(self, version: int, limit_s: float) -> bool:
        """Wait until every gateway that is heard of has the version; False when the limit passed first."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How replicas of a service are started."""

    argv: tuple[str, ...]
    """Command line that all of them share; `--replica`, `--node` and `--fd` are added."""
    drain_grace_s: float
    generation: int = 0


@dataclass(slots=True)
class _Process:
    record: Record
    child: Child
    since: float
    """When it came into its present state, on the loop's clock [s]."""


class Processes:
    """Runtime over local processes; see `orchestrator.core.Runtime`."""

    def __init__(
        self,
        *,
        state_dir: Path,
        launches: Mapping[str, Launch],
        services: Mapping[str, Service],
        nodes: Mapping[str, Node],
        routing: Routing,
        environment: Mapping[str, str],
        start_timeout_s: float = 60.0,
        surge: int = 1,
    ) -> None:
        self._logs = state_dir / "logs"
        self._records = Records(state_dir / "replicas")
        self._launches = dict(launches)
        self._services = services
        self._nodes = nodes
        self._routing = routing
        self._environment = environment
        self._start_timeout_s = start_timeout_s
        self._surge = surge
        self._desired: Placement | None = None
        self._processes: dict[str, _Process] = {}
        self._backoffs: dict[tuple[str, str], Backoff] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: asyncio.TimerHandle | None = None
        self._open = True
        self.starts = 0
        """Replicas started so far; the accounting takes differences."""
        self.actions: Counter[tuple[str, str]] = Counter()
        """(action, result) -> how often."""
        # No limit on connections: one replica that does not answer must not make another one's question wait.
        self._client = httpx.AsyncClient(timeout=READY_ANSWER_S, trust_env=False, limits=httpx.Limits(max_connections=None))

    # --- the two verbs, and the operator's third ---------------------------------------------------------------------------

    def replicas(self) -> tuple[Replica, ...]:
        """What runs now, by id."""
        return tuple(self._view(process.record) for _, process in sorted(self._processes.items()))

    def apply(self, desired: Placement) -> None:
        """Make it the target and take the first steps towards it."""
        self._desired = desired
        self._changed()

    def relaunch(self, launches: Mapping[str, Launch]) -> None:
        """Start replicas this way from now on. Those started another way are outdated, and replaced one by one."""
        self._launches = dict(launches)
        self._changed()

    def pid(self, replica: str) -> int:
        """Process id of a replica."""
        return self._processes[replica].record.pid

    def backoffs(self) -> dict[tuple[str, str], Backoff]:
        """(service, node) -> failures in a row, where there were any."""
        return dict(self._backoffs)

    # --- beginning and end -------------------------------------------------------------------------------------------------

    def adopt(self) -> int:
        """Take up the processes a predecessor left; returns how many. A record without its process is dropped."""
        for record in self._records.all():
            if record.kind != "stage":
                continue
            child = children.adopt(record.identity)
            if child is None:
                self._records.forget(record.id)
                continue
            self._take(record, child)
        self._publish()
        return len(self._processes)

    async def leave(self) -> None:
        """Stop attending; every process goes on, for a successor to adopt."""
        self._open = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._processes.values():
            process.child.release()
        await self._client.aclose()

    async def stop_all(self) -> None:
        """Drain and stop every replica, then leave."""
        self._open = False  # nothing is started from here on
        for process in list(self._processes.values()):
            if process.record.state != "draining":
                self._set(process, "draining")
                self._spawn_task(self._drain(process))
        self._publish()
        # Every drain is bounded; this is for a process that not even SIGKILL ends.
        await asyncio.gather(*(process.child.wait(self._longest_drain_s()) for process in self._processes.values()))
        await self.leave()
        for replica in list(self._processes):
            self._forget(replica)

    def _longest_drain_s(self) -> float:
        grace_s = max((launch.drain_grace_s for launch in self._launches.values()), default=DEFAULT_GRACE_S)
        return ACKNOWLEDGE_S + 2 * (grace_s + STOP_MARGIN_S)

    # --- one event --------------------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Answer a change: plan, take the steps, publish. Synchronous, so that no other change comes in between."""
        if not self._open:
            return
        # Before the first order nothing is known to be too many or missing: what was adopted just goes on.
        steps = () if self._desired is None else self._plan(self._desired)
        for step in steps:
            if isinstance(step, Change):
                self._change(step)
        self._publish()
        if self._starting is None and any(isinstance(step, Start) for step in steps):
            self._starting = asyncio.get_running_loop().call_later(START_PAUSE_S, self._start_missing)

    def _start_missing(self) -> None:
        """Start what the plan of this moment wants started."""
        self._starting = None
        if not self._open or self._desired is None:
            return
        for step in self._plan(self._desired):
            if isinstance(step, Start):
                self._start(step.service, step.node)
        self._publish()

    def _plan(self, desired: Placement) -> tuple[Step, ...]:
        t = asyncio.get_running_loop().time()
        blocked = [place for place, backoff in self._backoffs.items() if backoff.until > t]
        return reconcile(self.replicas(), desired, self._services, self._nodes, blocked=blocked, surge=self._surge)

    def _change(self, step: Change) -> None:
        process = self._processes[step.replica]
        if step.verb == "drain":
            self._set(process, "draining")
            self._spawn_task(self._drain(process))
            return
        self._set(process, "ready" if step.verb == "promote" else "standby")
        self.actions[step.verb, "ok"] += 1

    def _publish(self) -> int:
        return self._routing.publish(self.replicas())

    def _set(self, process: _Process, state: ReplicaState) -> None:
        log.info("%s: %s -> %s", process.record.id, process.record.state, state)
        process.record = process.record.model_copy(update={"state": state})
        process.since = asyncio.get_running_loop().time()
        self._records.save(process.record)

    def _view(self, record: Record) -> Replica:
        launch = self._launches.get(record.service)
        outdated = launch is not None and (record.generation < launch.generation or record.specification != launch.argv)
        return Replica(
            id=record.id, service=record.service, node=record.node, state=record.state, cpus=record.cpus,
            memory_bytes=record.memory_bytes, url=record.url, outdated=outdated,
        )  # fmt: skip

    # --- a replica's life --------------------------------------------------------------------------------------------------

    def _start(self, service: str, node: str) -> None:
        replica, launch, needs = self._next_id(service), self._launches[service], self._services[service]
        with socket.create_server((HOST, 0), backlog=LISTEN_BACKLOG) as listener:
            argv = (*launch.argv, "--replica", replica, "--node", node, "--fd", str(listener.fileno()))
            try:
                child = children.spawn(
                    argv, log=self._logs / f"{replica}.log", environment=self._environment, inherited=[listener.fileno()]
                )
            except OSError as error:
                self._failed(service, node, 0.0, f"{replica} could not be started: {error}")
                return
            port = listener.getsockname()[1]
        self.starts += 1
        self.actions["start", "ok"] += 1
        record = Record(
            id=replica, kind="stage", service=service, node=node, url=f"http://{HOST}:{port}", state="starting",
            generation=launch.generation, specification=launch.argv, cpus=needs.cpus, memory_bytes=needs.memory_bytes,
            pid=child.identity.pid, create_time=child.identity.create_time, argv=argv,
        )  # fmt: skip
        log.info("%s: started on %s as process %d at %s", replica, node, record.pid, record.url)
        self._records.save(record)
        self._take(record, child)

    def _take(self, record: Record, child: Child) -> None:
        process = _Process(record, child, asyncio.get_running_loop().time())
        self._processes[record.id] = process
        self._spawn_task(self._attend(process))
        if record.state == "draining":
            self._spawn_task(self._drain(process))

    async def _attend(self, process: _Process) -> None:
        """Walk with a process from its start to its end."""
        if process.record.state == "starting":
            await self._load(process)
        await process.child.exited.wait()
        record, lived_s = process.record, asyncio.get_running_loop().time() - process.since
        self._forget(record.id)
        if record.state == "draining":
            self.actions["drain", "ok"] += 1
        else:
            status = process.child.exit_code
            words = "" if status is None else f" with status {status}"
            problem = f"{record.id} ({record.state}) ended unasked{words}; its log: {self._logs / record.id}.log"
            self._failed(record.service, record.node, lived_s if record.state != "starting" else 0.0, problem)
        self._changed()

    async def _load(self, process: _Process) -> None:
        """Wait until it is ready to serve; one that takes too long is killed, and its end is the failure."""
        ready = asyncio.create_task(poll_ready(self._client, process.record.url))
        ended = asyncio.create_task(process.child.exited.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not process.child.exited.is_set():
                if process.record.state == "starting":
                    self._set(process, "standby")
                    self._changed()
            elif not process.child.exited.is_set():
                log.warning("%s: not ready after %.0f s; killed", process.record.id, self._start_timeout_s)
                await process.child.stop(0.5)
        finally:
            ready.cancel()
            ended.cancel()

    async def _drain(self, process: _Process) -> None:
        """The state has been published as draining; see the gateways off, then let it finish and stop it."""
        version = self._publish()
        if not await self._routing.acknowledged(version, ACKNOWLEDGE_S):
            log.warning("%s: draining although a gateway has not confirmed routes %d", process.record.id, version)
        launch = self._launches.get(process.record.service)
        await process.child.stop((launch.drain_grace_s if launch else DEFAULT_GRACE_S) + STOP_MARGIN_S)

    def _failed(self, service: str, node: str, lived_s: float, problem: str) -> None:
        loop = asyncio.get_running_loop()
        self._backoffs[service, node] = self._backoffs.get((service, node), Backoff()).after_failure(loop.time(), lived_s)
        pause_s = self._backoffs[service, node].until - loop.time()
        log.warning("%s; next start in %.1f s", problem, max(0.0, pause_s))
        self.actions["run", "failed"] += 1
        if pause_s > 0:
            loop.call_later(pause_s + 0.01, self._changed)

    def _forget(self, replica: str) -> None:
        self._processes.pop(replica)
        self._records.forget(replica)

    def _next_id(self, service: str) -> str:
        """A number no replica of the service has had: every one that ever ran left a log file."""
        names = [*self._processes, *(path.stem for path in self._logs.glob(f"{service}-*.log"))]
        numbers = [int(m[1]) for name in names if (m := re.fullmatch(rf"{re.escape(service)}-(\d+)", name))]
        return f"{service}-{max(numbers, default=0) + 1}"

    def _spawn_task(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _logged(work: Awaitable[None]) -> None:
    try:
        await work
    except Exception:
        log.exception("a replica's attendant failed; the replica goes on unattended")


async def poll_ready(client: httpx.AsyncClient, url: str) -> None:
    """Return when the process at the URL says that it is ready."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = await client.get(f"{url}/v2/health/ready")
            if answer.status_code == 200:
                return
        await asyncio.sleep(READY_POLL_S)
