"""The swarm driver: each replica a task on the box of its node, in a Swarm service of its own; boxes come and go.

One service per replica, and not one per stage and node: the keeper says which replica ends, and a Swarm that scales a service
of several tasks down chooses for itself. So a start is a service with one task, a drain is that service scaled to none, which
sends SIGTERM and waits for the grace time on the box, and what has ended is a service to be removed. A Swarm sends no events
of tasks, so they are looked at: often while something is on its way, twice a second otherwise. Of boxes and services it does,
and every two seconds all is compared, so that nothing depends on an event having arrived.

A box that the Swarm gives up (`down`) has ended its replicas: when it comes back, the Swarm stops what still runs there. One
that only lost its manager's leader for a moment (`unknown`) has not. A manager that does not answer, or has no leader, is a
`problem`, and everything is left as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from orchestrator.errors import SetupFailed
from orchestrator.runtimes import containers, tasks
from orchestrator.runtimes import output as outputs
from orchestrator.runtimes.chosen import Chosen, Images, missing
from orchestrator.runtimes.containers import EngineOptions
from orchestrator.runtimes.driver import Absence, Handle, Launch, Listener, StartFailed, Unreachable
from orchestrator.runtimes.ending import Ending
from orchestrator.runtimes.engine_api import OLDEST_API, Event, Refused, version_key
from orchestrator.runtimes.pins import Pins
from orchestrator.runtimes.reach import Reach
from orchestrator.runtimes.records import BLANK, Record
from orchestrator.runtimes.swarm_api import NOT_A_MANAGER, SwarmApi
from orchestrator.runtimes.tasks import Box, Deployed, Task

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Interval of full looks at boxes, services and tasks [s]."""
CALM_S, BUSY_S = 0.5, 0.1
"""Interval of looks at the tasks, when none is on its way to run or to end, and when one is [s]."""
STARTS_AT_ONCE = 4
PLACED_S = 25.0
"""A task runs within this time, or the start has failed [s]."""
TOLD_S = 5.0
"""A box hears of a task to be stopped, and its end is heard of, within this time [s]."""


class Stream(Protocol):
    """Events of a manager."""

    @property
    def ended(self) -> bool:
        """Whether it broke, or was closed."""

    async def close(self) -> None:
        """End it."""


class Manager(Images, Protocol):
    """The calls to a manager; see `swarm_api.SwarmApi`."""

    url: str

    async def connect(self) -> str:
        """The version of the API that it speaks."""

    async def network(self, name: str) -> dict[str, Any] | None:
        """All that is known of a network."""

    async def boxes(self) -> list[dict[str, Any]]:
        """Every box."""

    async def services(self, label: str) -> list[dict[str, Any]]:
        """Services with a label."""

    async def tasks(self, label: str) -> list[dict[str, Any]]:
        """Their tasks."""

    async def create_service(self, body: Mapping[str, Any]) -> str:
        """Create a service; returns its id."""

    async def scale_service(self, service: str, replicas: int) -> None:
        """Say how many tasks it is to have."""

    async def remove_service(self, service: str) -> None:
        """Remove it."""

    async def last_lines(self, service: str, lines: int, /) -> str:
        """The end of what its task has written."""

    async def events(self, filters: Mapping[str, list[str]], hear: Callable[[Event], None], over: Callable[[], None]) -> Stream:
        """Events, from the return on."""

    def close(self) -> None:
        """Let go of everything."""


class Kept(Ending):
    """A service with its one task, and the event of the task's end; see `driver.Handle`."""

    def __init__(self, service: str, replica: str, stop: Callable[[Kept, float], Awaitable[None]]) -> None:
        super().__init__()
        self.service = service
        self.replica = replica
        self.task = ""
        """Its id, once it has been seen."""
        self.box = ""
        """Id of the box."""
        self.url = ""
        self.state = "not there yet"
        """Of the task, as the Swarm says it, with what went wrong."""
        self.stopping = False
        """Whether we have told it to end, or know that somebody else has."""
        self.runs = asyncio.Event()
        self._stop = stop

    @property
    def is_moving(self) -> bool:
        """Whether it is on its way to run, or to end."""
        return not self.exited.is_set() and (self.stopping or not self.runs.is_set())

    async def stop(self, grace_s: float) -> None:
        """SIGTERM; SIGKILL comes from its box, after the grace time that it was started with, whatever is said here."""
        await self._stop(self, grace_s)

    def release(self) -> None:
        """Tasks are watched all together; see `Swarm.close`."""


class Swarm:
    """Driver over one Swarm; see `driver.Driver`."""

    def __init__(self, options: EngineOptions, pins: Pins, manager: Manager | None = None) -> None:
        self._options = options
        self._api: Manager = SwarmApi(options.url) if manager is None else manager
        self._images = Chosen(options, pins, self._api)
        self._label = f"{containers.SCOPE}={options.scope}"
        self._kept: dict[str, Kept] = {}
        """By the id of their service; from its creation until nothing remains of it."""
        self._boxes: dict[str, Box] = {}
        """By their id."""
        self._nodes: dict[str, Box] = {}
        """By the node that they are."""
        self._creating: set[str] = set()
        """Names of services that we have asked for and know no id of yet."""
        self._starts = asyncio.Semaphore(STARTS_AT_ONCE)
        self._watching: asyncio.Task[None] | None = None
        self._look_at_all = True
        self._reach = Reach(f"the manager at {self._api.url}", self._api.connect)

    @property
    def problem(self) -> str | None:
        """See `Driver`."""
        return self._reach.problem

    def absent(self, node: str) -> Absence | None:
        """See `Driver`; a node that no box is, by label or host name, is down."""
        box = self._nodes.get(node)
        return "down" if box is None else box.absence

    def specification(self, launch: Launch) -> str:
        """See `Driver`: the id of the image and everything in the service's description that replicas share."""
        return launch.specification(tasks.body(self._options, BLANK, launch, self._images.image(launch) or "", ""))

    # --- beginning and end -------------------------------------------------------------------------------------------------

    async def open(self, listener: Listener) -> None:
        """See `Driver`."""
        self._reach.listener = listener
        try:
            with _setting_up(self._api.url):
                await self._check()
        except SetupFailed:
            self._api.close()
            raise

    async def _check(self) -> None:
        version = await self._api.connect()
        if version_key(version) < version_key(OLDEST_API):
            raise SetupFailed(
                f"the manager at {self._api.url} speaks version {version} of the Docker API, and {OLDEST_API} is needed: "
                "install Docker Engine 20.10 or later"
            )
        await self._look_at_boxes()
        await self._images.check()
        with contextlib.suppress(Refused):  # hidden by a proxy: the first start will tell
            check_network(self._options.network, await self._api.network(self._options.network), _own_addresses())

    async def find(self, known: Sequence[Record]) -> list[tuple[Record, Handle]]:
        """See `Driver`; a service is known by its labels, so nothing need have been written down."""
        found: list[tuple[Record, Handle]] = []
        with _setting_up(self._api.url):
            current = _by_service(await self._tasks())
            for service in await self._services():
                task = current.get(service.id)
                if task is not None and (record := self._recognise(service, task)) is not None:
                    found.append((record, self._register(service.id, record.id, task)))
                else:
                    await self._remove_leftover(service)
        self._watching = asyncio.create_task(self._reach.watch(self._follow))
        return found

    def _recognise(self, service: Deployed, task: Task) -> Record | None:
        """The record of a replica that serves; None of anything else."""
        marks = containers.read(service.labels)
        # One scaled to none ends by itself, and one that is not there yet has nobody who waits for it.
        if marks is None or not service.replicas or not (task.runs and task.url) or self._is_lost(task):
            return None
        return Record(
            id=marks.replica, kind="stage", service=marks.service, node=marks.node, url=task.url, generation=marks.generation,
            specification=marks.specification, task=task.id, **service.reserved,
        )  # fmt: skip

    async def close(self) -> None:
        """See `Driver`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._api.close()

    @property
    def has_news(self) -> bool:
        """See `Driver`."""
        return self._images.has_news

    async def refresh(self) -> None:
        """See `Driver`: use what the names of the images stand for on the manager now."""
        await self._images.refresh()
        self._reach.changed()

    def revert(self) -> None:
        """See `Driver`: back to the images before."""
        self._images.revert()
        self._reach.changed()

    def keep(self) -> None:
        """See `Driver`."""
        self._images.keep()

    # --- a replica's life --------------------------------------------------------------------------------------------------

    async def start(self, record: Record, launch: Launch, output: Path) -> tuple[Record, Handle]:
        """See `Driver`."""
        name = containers.name_of(self._options, record.id)
        self._creating.add(name)
        try:
            outputs.begin(output)
            record = record.model_copy(update={"specification": self.specification(launch)})
            async with self._starts:
                service = await self._reach.asked(self._api.create_service(self._body(record, launch)))
            kept = self._register(service, record.id)
        except (Refused, OSError) as error:
            raise StartFailed(str(error)) from None
        finally:
            self._creating.discard(name)
        await self._until_it_runs(kept)
        return record.model_copy(update={"url": kept.url, "task": kept.task}), kept

    def _body(self, record: Record, launch: Launch) -> dict[str, Any]:
        image = self._images.image(launch)
        if image is None:
            raise StartFailed(missing(self._options.image_for(launch)))
        box = self._nodes.get(record.node)
        if box is None:
            raise StartFailed(_no_box(record.node))
        return tasks.body(self._options, record, launch, image, box.constraint)

    async def _until_it_runs(self, kept: Kept) -> None:
        """Wait for the task of a service that was created. One that does not run is removed."""
        self._reach.wake.set()
        runs, exited = asyncio.create_task(kept.runs.wait()), asyncio.create_task(kept.exited.wait())
        try:
            await asyncio.wait({runs, exited}, timeout=PLACED_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            runs.cancel()
            exited.cancel()
            if not kept.runs.is_set():
                # Where this fails, the next full look finds a service that nobody knows.
                self._kept.pop(kept.service, None)
                with contextlib.suppress(Refused, Unreachable):
                    await self._api.remove_service(kept.service)
        if not kept.runs.is_set():
            raise StartFailed(f"its task did not run: {kept.state}")

    async def discard(self, replica: str, output: Path, *, unasked: bool) -> None:
        """See `Driver`: keep the end of its output where its box can be asked for it, and remove the service."""
        for kept in [kept for kept in self._kept.values() if kept.replica == replica]:
            try:
                if unasked:
                    log.warning("%s: its task ended: %s", replica, kept.state)
                if unasked and not self._is_away(kept.box):
                    text = await self._reach.asked(self._api.last_lines(kept.service, outputs.KEPT_LINES))
                    outputs.keep(output, text)
                    outputs.tell(replica, text)
                await self._reach.asked(self._api.remove_service(kept.service))
            except (Refused, Unreachable):
                # It is gone already, or the next full look finds a service that nobody knows.
                continue
            finally:
                self._kept.pop(kept.service, None)

    async def _stop(self, kept: Kept, grace_s: float) -> None:
        """Scale a service to none as soon as the manager answers, and wait; one whose service is gone already is fine."""
        kept.stopping = True
        while not kept.exited.is_set():
            try:
                await self._reach.asked(self._api.scale_service(kept.service, 0))
            except Refused as refused:
                if refused.status != 404:
                    log.warning("%s: it could not be scaled to none: %s", kept.replica, refused)
            except Unreachable:
                await self._reach.answers.wait()
                continue
            self._reach.wake.set()
            await kept.wait(grace_s + TOLD_S)
            return

    def _register(self, service: str, replica: str, task: Task | None = None) -> Kept:
        kept = self._kept[service] = Kept(service, replica, self._stop)
        if task is not None:
            self._note(kept, task)
        return kept

    # --- watching -----------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Watch through one stream of events.

        Raises:
            Unreachable: it broke, or the manager does not answer.
        """
        stream = await self._api.events({"type": ["node", "service"]}, self._hear, self._reach.wake.set)
        loop, self._look_at_all = asyncio.get_running_loop(), True
        next_full = loop.time()
        try:
            while not stream.ended:
                if self._look_at_all or loop.time() >= next_full:
                    self._look_at_all = False
                    next_full = loop.time() + LOOK_S
                    await self._look_at_boxes()
                    await self._look_for_leftovers()
                await self._look()
                self._reach.found()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BUSY_S if any(k.is_moving for k in self._kept.values()) else CALM_S):
                        await self._reach.wake.wait()
                self._reach.wake.clear()
        finally:
            await stream.close()
        raise Unreachable(f"{self._reach.who} ended its stream of events")

    def _hear(self, event: Event) -> None:
        # Of services we know what we do ourselves; of boxes the event does not say all.
        if event.get("Type") == "node" or event.get("Action") == "remove":
            self._look_at_all = True
            self._reach.wake.set()

    async def _look_at_boxes(self) -> None:
        boxes = [tasks.box(entry) for entry in await self._api.boxes()]
        before, self._boxes, self._nodes = self._nodes, {box.id: box for box in boxes}, tasks.by_node(boxes)
        for kept in list(self._kept.values()):
            if kept.box and self._is_away(kept.box):
                kept.state = "its box is down"
                kept.ended(None)
        for node in before.keys() | self._nodes.keys():
            was, now = (nodes[node].absence if node in nodes else "down" for nodes in (before, self._nodes))
            if was != now and before:
                log.warning("box %s: %s", node, {None: "is there", "down": "is down", "leaving": "is to be emptied"}[now])
        if before and before != self._nodes:
            self._reach.changed()

    async def _look(self) -> None:
        """Bring every replica up to date with its task."""
        # Only what was there before the question can be missing from the answer.
        known = dict(self._kept)
        current = _by_service(await self._tasks())
        if any((task := current.get(i)) is not None and task.told_to_end and not kept.stopping for i, kept in known.items()):
            # By somebody who empties its box, or because the box is gone: then there is nothing left to drain.
            await self._look_at_boxes()
        for service, kept in known.items():
            task = current.get(service)
            if task is not None:
                self._note(kept, task)
            elif kept.task:
                kept.ended(None)

    def _note(self, kept: Kept, task: Task) -> None:
        """Take in what a task is now."""
        kept.task, kept.box, kept.state = task.id, task.box, f"{task.state} {task.error}".strip()
        if self._is_lost(task):
            kept.state = "its box is down"
            kept.ended(None)
            return
        if task.runs and task.url:
            moved, kept.url = bool(kept.url) and task.url != kept.url, task.url
            kept.runs.set()
            if moved and self._reach.listener is not None:
                self._reach.listener.moved(kept.replica, kept.url)
        if task.told_to_end and not kept.stopping:
            kept.stopping = True
            if self._reach.listener is not None:
                self._reach.listener.ending(kept.replica)
        if task.over:
            kept.ended(task.exit_code)

    async def _look_for_leftovers(self) -> None:
        known, creating = set(self._kept), set(self._creating)
        for service in await self._services():
            if service.id not in known | set(self._kept) and service.name not in creating | self._creating:
                await self._remove_leftover(service)

    async def _remove_leftover(self, service: Deployed) -> None:
        log.warning("service %s is left over; removed", service.name)
        with contextlib.suppress(Refused):
            await self._api.remove_service(service.id)

    def _is_lost(self, task: Task) -> bool:
        return bool(task.box) and self._is_away(task.box)

    def _is_away(self, box: str) -> bool:
        """Whether the Swarm has given up a box."""
        return box not in self._boxes or self._boxes[box].absence == "down"

    async def _services(self) -> list[Deployed]:
        return [tasks.deployed(entry) for entry in await self._api.services(self._label)]

    async def _tasks(self) -> list[Task]:
        return [tasks.task(entry, self._options.network) for entry in await self._api.tasks(self._label)]


def check_network(name: str, document: Mapping[str, Any] | None, own: Iterable[str]) -> None:
    """See that stages can be attached to a network, and reached on it from here, where these addresses are ours.

    Raises:
        SetupFailed: they cannot.
    """
    if document is None:
        raise SetupFailed(f"there is no network {name} in this Swarm: docker network create -d overlay --attachable {name}")
    if document.get("Driver") != "overlay":
        raise SetupFailed(f"network {name} is no overlay, so it does not reach from box to box: name one that is")
    subnets = [ipaddress.ip_network(part["Subnet"]) for part in (document.get("IPAM") or {}).get("Config") or ()]
    if not any(ipaddress.ip_address(address) in subnet for address in own for subnet in subnets):
        raise SetupFailed(
            f"this orchestrator is not attached to the network {name}, and reaches no stage: run it there, as a service of the "
            f"stack (espalier render stack), or as a container: docker run --network {name} …"
        )


def _own_addresses() -> list[str]:
    return [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family.name == "AF_INET"
    ]


def _by_service(found: Iterable[Task]) -> dict[str, Task]:
    """The task of each service; of one with several, which is nothing of ours, one that is not over."""
    return {task.service: task for task in sorted(found, key=lambda task: (not task.over, task.id))}


async def sweep(scope: str, grace_s: float) -> int:
    """Stop and remove every service of a scope whose orchestrator is gone; returns how many there were.

    Raises:
        Unreachable: the manager does not answer.
    """
    api, label = SwarmApi(), f"{containers.SCOPE}={scope}"
    try:
        await api.connect()
        found = [tasks.deployed(entry) for entry in await api.services(label)]
        for service in found:
            with contextlib.suppress(Refused):  # somebody else has removed it
                await api.remove_service(service.id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while await api.tasks(label):  # noqa: ASYNC110 - a Swarm sends no events of tasks
                    await asyncio.sleep(BUSY_S)
        return len(found)
    finally:
        api.close()


def _no_box(node: str) -> str:
    return f"no box of this Swarm is the node {node}: none has that host name or the label {tasks.NODE}={node}"


@contextlib.contextmanager
def _setting_up(url: str) -> Iterator[None]:
    """What goes wrong before first use, in the words of whoever brings the system up."""
    try:
        yield
    except Unreachable as error:
        if NOT_A_MANAGER in str(error):
            raise SetupFailed(f"the engine at {url} manages no Swarm: docker swarm init there, or name a manager") from None
        raise SetupFailed(f"{error}; name a manager of the Swarm by DOCKER_HOST or a Docker context") from None
    except Refused as refused:
        raise SetupFailed(f"the manager refuses what is needed of it: {refused}") from None
