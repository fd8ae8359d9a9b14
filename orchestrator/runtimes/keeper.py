"""Keeps replicas alive, whatever they are made of: plans, starts, watches and drains them, over a `driver`.

Every change of state is one event: written down, published in the routes, and answered by `reconcile`, all before anything
else happens. One attendant coroutine walks with each replica: it is started, loads, is on `standby`, and its end is waited
for. A replica that ends unasked is out of the routes within milliseconds and is started again after a pause (`backoff`).
While the driver has a problem nothing is planned: every replica keeps the state it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from orchestrator.core import Node, Placement, Replica, Service
from orchestrator.errors import Infeasible, UsageError
from orchestrator.runtimes.backoff import Backoff
from orchestrator.runtimes.driver import Absence, Driver, Handle, Launch, StartFailed, Unreachable
from orchestrator.runtimes.reconcile import EPSILON, Change, Start, Step, reconcile
from orchestrator.runtimes.records import Record, Records
from services.dataplane.routes import ReplicaState

log = logging.getLogger(__name__)

READY_POLL_S = 0.05
START_PAUSE_S = 0.01
"""Starting takes some milliseconds of this process; before that, gateways hear what is gone and what is promoted [s]."""
START_LIMIT_S = 30.0
"""Who leaves waits this long for starts that are under way, so that a successor finds them [s]."""
READY_ANSWER_S = 2.0
"""A loading replica may hold a question this long: its socket listens before it does [s]."""
LIVE_PAUSE_S = 1.0
"""Between two rounds of asking every loaded replica whether it is alive [s]."""
SILENT_ROUNDS = 3
"""A replica that answers nothing at all for so many rounds hangs, and is killed: with the time for each answer, 9 s."""
ACKNOWLEDGE_S = 1.0
"""A drain waits this long for gateways to say that they have the routes without the replica [s]."""
DISCARD_S = 10.0
"""What remains of a replica is cleared away within this time, or left to a successor [s]."""
DEFAULT_GRACE_S = 10.0
"""For a replica whose service the testbed no longer has [s]."""
STOP_MARGIN_S = 1.0
"""Between the grace time that a replica keeps itself and SIGKILL [s]."""


class Routing(Protocol):
    """Whoever tells the gateways."""

    def publish(self, replicas: Sequence[Replica], allowance: Mapping[str, int], patience: Mapping[str, float]) -> int:
        """Make replicas known, and when standbys are let out; returns the version of the routes that says so."""

    async def acknowledged(self, version: int, limit_s: float) -> bool:
        """Wait until every gateway that is heard of has the version; False when the limit passed first."""


@dataclass(slots=True)
class _Member:
    """A replica, from the moment its start is decided."""

    record: Record
    since: float
    """When it came into its present state, on the loop's clock [s]."""
    handle: Handle | None = None
    """None while it is being started."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `handle` is there, and when there will never be one."""
    silent_rounds: int = 0
    """How often in a row it did not answer."""


class Keeper:
    """Runtime over a driver; see `orchestrator.core.Runtime`. `adopt` comes before everything else."""

    def __init__(
        self,
        *,
        driver: Driver,
        state_dir: Path,
        launches: Mapping[str, Launch],
        services: Mapping[str, Service],
        nodes: Mapping[str, Node],
        routing: Routing,
        start_timeout_s: float = 60.0,
        surge: int = 1,
    ) -> None:
        self._driver = driver
        self._logs = state_dir / "logs"
        self._records = Records(state_dir / "replicas")
        self._launches = dict(launches)
        self._services = services
        self._nodes = nodes
        self._routing = routing
        self._start_timeout_s = start_timeout_s
        self._surge = surge
        self._desired: Placement | None = None
        self._let_out: set[str] = set()
        """Replicas that gateways have let out and no decision has known of yet."""
        self._members: dict[str, _Member] = {}
        self._backoffs: dict[tuple[str, str], Backoff] = {}
        self._attendants: set[asyncio.Task[None]] = set()
        """One for each replica, and for those that have ended until nothing remains of them."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._starting: asyncio.TimerHandle | None = None
        self._open = False
        """Whether replicas are started and stopped: from the adoption to the end."""
        self.starts = 0
        """Replicas started so far; the accounting takes differences."""
        self.actions: Counter[tuple[str, str]] = Counter()
        """(action, result) -> how often."""
        # No limit on connections: one replica that does not answer must not make another one's question wait.
        self._client = httpx.AsyncClient(timeout=READY_ANSWER_S, trust_env=False, limits=httpx.Limits(max_connections=None))

    # --- the two verbs, and the operator's third ---------------------------------------------------------------------------

    def replicas(self) -> tuple[Replica, ...]:
        """What runs now, by id."""
        current = {service: self._driver.specification(launch) for service, launch in self._launches.items()}
        return tuple(self._view(member.record, current) for _, member in sorted(self._members.items()))

    def apply(self, desired: Placement, seen: Sequence[Replica] = ()) -> None:
        """Make it the target and take the first steps towards it; what was let out after `seen` stays at work."""
        self._desired = desired
        self._let_out.difference_update(replica.id for replica in seen if replica.let_out)
        self.changed()

    def let_out(self, service: str, replica: str) -> bool:
        """Put a standby to work, as a gateway has done already, until the next decision says what becomes of it.

        Returns:
            False where it is at work anyway.

        Raises:
            UsageError: the service has no such replica.
            Infeasible: it may not be let out: it is no standby, the allowance is spent, or its node lacks the cores.
        """
        member = self._members.get(replica)
        if member is None or member.record.service != service:
            raise UsageError(f"{service} has no replica {replica!r}")
        if member.record.state == "ready":
            return False
        if (why := self._obstacle(member.record)) is not None:
            raise Infeasible(f"{replica} cannot be let out: {why}")
        self._let_out.add(replica)
        self._set(member, "ready")
        self.changed()
        return True

    def _obstacle(self, record: Record) -> str | None:
        """Why a replica may not be let out."""
        if record.state != "standby":
            return f"it is {record.state}"
        if not self._allowance().get(record.service):
            return f"the allowance of {record.service} is spent"
        # Those that load may be wanted at work as soon as they have, so they have their cores already.
        others = (member.record for member in self._members.values())
        used = sum(other.cpus for other in others if other.node == record.node and other.state != "standby")
        node = self._nodes.get(record.node)
        if node is None or used + record.cpus > node.cpus + EPSILON:
            return f"{record.node} lacks the cores"
        return None

    def _allowance(self) -> dict[str, int]:
        """Standbys that gateways may still let out, by service."""
        if self._desired is None or not self._open:
            return {}
        spent = Counter(self._members[replica].record.service for replica in self._let_out)
        return {service: left for service, n in self._desired.allowance.items() if (left := n - spent[service]) > 0}

    def relaunch(
        self,
        launches: Mapping[str, Launch],
        services: Mapping[str, Service] | None = None,
        nodes: Mapping[str, Node] | None = None,
    ) -> None:
        """Start replicas this way from now on. Those started another way are outdated, and replaced one by one.

        Args:
            launches: how to start replicas, by service.
            services: what they need; as before where it is not given.
            nodes: what there is; as before where it is not given.
        """
        self._launches = dict(launches)
        self._services = self._services if services is None else services
        self._nodes = self._nodes if nodes is None else nodes
        # Whatever failed to start before may start now.
        self._backoffs = {place: backoff.forgiven() for place, backoff in self._backoffs.items()}
        self.changed()

    # What replicas are started from, beside their launches: see `driver.Driver`.

    @property
    def has_news(self) -> bool:
        """Whether replicas could be started from something newer."""
        return self._driver.has_news

    async def refresh(self) -> None:
        """Use the newest; from then on, `replicas` says which ones are outdated by it."""
        await self._driver.refresh()

    def revert(self) -> None:
        """Use what was used before."""
        self._driver.revert()

    def keep(self) -> None:
        """Go on using it."""
        self._driver.keep()

    # --- nodes that are not to be counted on -------------------------------------------------------------------------------

    @property
    def nodes_down(self) -> frozenset[str]:
        """Nodes that are not there; what ran on them has ended."""
        return self._absent("down")

    @property
    def nodes_leaving(self) -> frozenset[str]:
        """Nodes that are to be emptied: what runs there serves until it is no longer wanted, and nothing is started."""
        return self._absent("leaving")

    def _absent(self, *why: Absence) -> frozenset[str]:
        return frozenset(node for node in self._nodes if self._driver.absent(node) in why)

    # --- what a status shows ----------------------------------------------------------------------------------------------

    @property
    def problem(self) -> str | None:
        """Why everything is left as it is; None when all is well."""
        return self._driver.problem

    def runs_as(self, replica: str) -> dict[str, int | str]:
        """What a person finds a replica by; see `Record.runs_as`."""
        return self._members[replica].record.runs_as

    def backoffs(self) -> dict[tuple[str, str], Backoff]:
        """(service, node) -> failures in a row, where there were any."""
        return dict(self._backoffs)

    # --- beginning and end -------------------------------------------------------------------------------------------------

    async def adopt(self) -> int:
        """Open the driver and take up what a predecessor left running; returns how many replicas.

        Raises:
            SetupFailed: no replica can be run here.
        """
        await self._driver.open(self)
        known = {record.id: record for record in self._records.all() if record.kind == "stage"}
        found = await self._driver.find(list(known.values()))
        taken = await asyncio.gather(*(self._remember(record, known.get(record.id)) for record, _ in found))
        self._open = True
        for record, (_, handle) in zip(taken, found, strict=True):
            self._records.save(record)
            self._adopted(record, handle)
        for replica in known.keys() - self._members.keys():
            self._records.forget(replica)
        self._publish()
        self._background(self._look_for_hung())
        return len(found)

    async def _remember(self, found: Record, known: Record | None) -> Record:
        """The record of what was found, with the state it had; one that answers where nothing is known was probably at work."""
        if known is not None and known.is_same_as(found):
            return known.model_copy(update={"url": found.url})
        answers = await _says_ready(self._client, found.url)
        return found.model_copy(update={"state": "ready" if answers else "starting"})

    def _adopted(self, record: Record, handle: Handle) -> None:
        member = _Member(record, self._now(), handle)
        member.started.set()
        self._members[record.id] = member
        self._attend(self._live(member, handle))
        if record.state == "draining":
            self._background(self._drain(member))

    async def leave(self) -> None:
        """Stop attending; every replica goes on, for a successor to adopt."""
        self._open = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_LIMIT_S):
                for member in list(self._members.values()):
                    await member.started.wait()
        await self._let_go()

    async def stop_all(self) -> None:
        """Drain and stop every replica, then leave."""
        self._open = False  # nothing is started from here on
        for member in list(self._members.values()):
            if member.record.state != "draining":
                self._set(member, "draining")
                self._background(self._drain(member))
        self._publish()
        if self._attendants:
            # Every drain is bounded; the limit is for a replica that not even SIGKILL ends, and for an engine that is away.
            await asyncio.wait(self._attendants, timeout=self._longest_drain_s())
        for replica in self._members:
            log.error("%s: it could not be stopped, and goes on", replica)
        await self._let_go()

    async def _let_go(self) -> None:
        tasks = [*self._attendants, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self._members.values():
            if member.handle is not None:
                member.handle.release()
        await self._driver.close()
        await self._client.aclose()

    def _longest_drain_s(self) -> float:
        grace_s = max((launch.drain_grace_s for launch in self._launches.values()), default=DEFAULT_GRACE_S)
        return START_LIMIT_S + ACKNOWLEDGE_S + 2 * (grace_s + STOP_MARGIN_S) + DISCARD_S

    # --- one event --------------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Answer a change: plan, take the steps, publish. Synchronous, so that no other change comes in between."""
        if not self._open:
            return
        steps = self._plan()
        for step in steps:
            if isinstance(step, Change):
                self._change(step)
        self._publish()
        if self._starting is None and any(isinstance(step, Start) for step in steps):
            self._starting = asyncio.get_running_loop().call_later(START_PAUSE_S, self._start_missing)

    def moved(self, replica: str, url: str) -> None:
        """A replica has another address now."""
        member = self._members.get(replica)
        if member is not None and member.record.url != url:
            log.info("%s: now at %s", replica, url)
            self._save(member, member.record.model_copy(update={"url": url}))
            self._publish()

    def ending(self, replica: str) -> None:
        """Somebody else has told a replica to end: it is no longer routed to, and its end is no failure."""
        member = self._members.get(replica)
        if member is None or member.record.state == "draining":
            return
        log.warning("%s: told to end by somebody else", replica)
        self._set(member, "draining")
        self._background(self._drain(member))
        self.changed()

    def _start_missing(self) -> None:
        """Start what the plan of this moment wants started."""
        self._starting = None
        if not self._open:
            return
        for step in self._plan():
            if isinstance(step, Start):
                self._start(step.service, step.node)
        self._publish()

    def _plan(self) -> tuple[Step, ...]:
        # Before the first order nothing is known to be too many or missing: what was adopted just goes on.
        if self._desired is None or self._driver.problem is not None:
            return ()
        t = self._now()
        blocked = [place for place, backoff in self._backoffs.items() if backoff.until > t]
        blocked += [(service, node) for node in self._absent("down", "leaving") for service in self._services]
        out: dict[str, Counter[str]] = {}
        for replica in self._let_out:
            record = self._members[replica].record
            out.setdefault(record.service, Counter())[record.node] += 1
        desired = self._desired.with_let_out(out) if out else self._desired
        return reconcile(self.replicas(), desired, self._services, self._nodes, blocked=blocked, surge=self._surge)

    def _change(self, step: Change) -> None:
        member = self._members[step.replica]
        if step.verb == "drain":
            self._set(member, "draining")
            self._background(self._drain(member))
            return
        self._set(member, "ready" if step.verb == "promote" else "standby")
        self.actions[step.verb, "ok"] += 1

    def _publish(self) -> int:
        patience = self._desired.patience if self._desired is not None else {}
        return self._routing.publish(self.replicas(), self._allowance(), patience)

    def _set(self, member: _Member, state: ReplicaState) -> None:
        log.info("%s: %s -> %s", member.record.id, member.record.state, state)
        member.since = self._now()
        if state != "ready":
            self._let_out.discard(member.record.id)
        self._save(member, member.record.model_copy(update={"state": state}))

    def _save(self, member: _Member, record: Record) -> None:
        member.record = record
        if member.handle is not None:
            self._records.save(record)

    def _view(self, record: Record, current: Mapping[str, str]) -> Replica:
        """A replica as others see it; `current` has the specification that one of each service would be started with now."""
        launch = self._launches.get(record.service)
        outdated = launch is not None and (
            record.generation < launch.generation or record.specification != current[record.service]
        )
        return Replica(
            id=record.id, service=record.service, node=record.node, state=record.state, cpus=record.cpus,
            memory_bytes=record.memory_bytes, url=record.url, outdated=outdated, gpus=record.gpus,
            let_out=record.id in self._let_out,
        )  # fmt: skip

    # --- a replica's life --------------------------------------------------------------------------------------------------

    def _start(self, service: str, node: str) -> None:
        launch = self._launches[service]
        record = Record(
            id=self._next_id(service), kind="stage", service=service, node=node, generation=launch.generation,
            specification=self._driver.specification(launch), cpus=launch.cpus, memory_bytes=launch.memory_bytes,
            gpus=launch.gpus,
        )  # fmt: skip
        member = _Member(record, self._now())
        self._members[record.id] = member
        self._attend(self._begin(member, launch))

    async def _begin(self, member: _Member, launch: Launch) -> None:
        """Walk with a replica that is to be started."""
        record = member.record
        try:
            begun, handle = await self._driver.start(record, launch, self._log(record.id))
            member.handle = handle
        except StartFailed as error:
            self._members.pop(record.id)
            self._failed(record, 0.0, f"{record.id} could not be started: {error}")
            self.changed()
            return
        except Unreachable:
            # The driver says so itself, and says when it is over; then what is missing is started.
            self._members.pop(record.id)
            self.changed()
            return
        finally:
            member.started.set()
        self.starts += 1
        self.actions["start", "ok"] += 1
        # Meanwhile it may have been told to drain.
        self._save(member, begun.model_copy(update={"state": member.record.state}))
        where = " ".join(f"{what} {which}" for what, which in begun.runs_as.items())
        log.info("%s: started on %s as %s at %s", record.id, record.node, where, begun.url)
        self._publish()
        await self._live(member, handle)

    async def _live(self, member: _Member, handle: Handle) -> None:
        """Walk with a replica that runs, to its end."""
        if member.record.state == "starting":
            await self._load(member, handle)
        await handle.exited.wait()
        record, lived_s = member.record, self._now() - member.since
        self._members.pop(record.id)
        self._let_out.discard(record.id)
        self._records.forget(record.id)
        unasked = record.state != "draining"
        if unasked:
            status = "" if handle.exit_code is None else f" with status {handle.exit_code}"
            problem = f"{record.id} ({record.state}) ended unasked{status}; its log: {self._log(record.id)}"
            self._failed(record, lived_s if record.state != "starting" else 0.0, problem)
        else:
            self.actions["drain", "ok"] += 1
        self.changed()
        await self._driver.discard(record.id, self._log(record.id), unasked=unasked)

    async def _load(self, member: _Member, handle: Handle) -> None:
        """Wait until it is ready to serve; one that takes too long is killed, and its end is the failure."""
        ready = asyncio.create_task(poll_ready(self._client, lambda: member.record.url))
        ended = asyncio.create_task(handle.exited.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not handle.exited.is_set():
                if member.record.state == "starting":
                    self._set(member, "standby")
                    self.changed()
            elif not handle.exited.is_set():
                log.warning("%s: not ready after %.0f s; killed", member.record.id, self._start_timeout_s)
                await handle.stop(0.5)
        finally:
            ready.cancel()
            ended.cancel()

    async def _look_for_hung(self) -> None:
        """Until cancelled: a replica can stop answering without ending, and would keep its place in the routes for ever."""
        while True:
            await asyncio.sleep(LIVE_PAUSE_S)
            if self.problem is None:
                loaded = [member for member in self._members.values() if member.record.state in ("standby", "ready")]
                await asyncio.gather(*(self._ask_if_alive(member) for member in loaded))

    async def _ask_if_alive(self, member: _Member) -> None:
        try:
            # Whatever it answers, it lives.
            await self._client.get(f"{member.record.url}/v2/health/live")
            member.silent_rounds = 0
        except httpx.TransportError:
            member.silent_rounds += 1
        if member.silent_rounds == SILENT_ROUNDS and member.handle is not None:
            log.warning("%s: has not answered %d times in a row; killed", member.record.id, SILENT_ROUNDS)
            self._background(member.handle.stop(0.5))

    async def _drain(self, member: _Member) -> None:
        """The state has been published as draining; see the gateways off, then let it finish and stop it."""
        version = self._publish()
        if not await self._routing.acknowledged(version, ACKNOWLEDGE_S):
            log.warning("%s: draining although a gateway has not confirmed routes %d", member.record.id, version)
        await member.started.wait()
        if member.handle is not None:
            launch = self._launches.get(member.record.service)
            await member.handle.stop((launch.drain_grace_s if launch else DEFAULT_GRACE_S) + STOP_MARGIN_S)

    def _failed(self, record: Record, lived_s: float, problem: str) -> None:
        loop = asyncio.get_running_loop()
        place = (record.service, record.node)
        self._backoffs[place] = self._backoffs.get(place, Backoff()).after_failure(loop.time(), lived_s)
        pause_s = self._backoffs[place].until - loop.time()
        log.warning("%s; next start in %.1f s", problem, max(0.0, pause_s))
        self.actions["run", "failed"] += 1
        if pause_s > 0:
            loop.call_later(pause_s + 0.01, self.changed)

    def _next_id(self, service: str) -> str:
        """A number no replica of the service has had: every one that ever ran left a log file."""
        names = [*self._members, *(path.stem for path in self._logs.glob(f"{service}-*.log"))]
        numbers = [int(m[1]) for name in names if (m := re.fullmatch(rf"{re.escape(service)}-(\d+)", name))]
        return f"{service}-{max(numbers, default=0) + 1}"

    def _log(self, replica: str) -> Path:
        return self._logs / f"{replica}.log"

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _attend(self, work: Coroutine[Any, Any, None]) -> None:
        _keep(work, self._attendants)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        _keep(work, self._tasks)


def _keep(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    task.add_done_callback(_complain)


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a replica's attendant failed; the replica goes on unattended", exc_info=error)


async def _says_ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/v2/health/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def poll_ready(client: httpx.AsyncClient, url: Callable[[], str]) -> None:
    """Return when whatever is at the URL, which may change meanwhile, says that it is ready."""
    while not await _says_ready(client, url()):  # noqa: ASYNC110 - nothing would set an event
        await asyncio.sleep(READY_POLL_S)
