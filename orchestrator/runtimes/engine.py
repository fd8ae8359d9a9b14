"""The engine driver: each replica a container on one Docker engine, nodes being shares of its machine.

Which containers are ours is said by one label, the scope, and no other container is ever touched. The engine's events tell of
an end within milliseconds; every two seconds a full list is compared with what is known, so that nothing depends on an event
having arrived. An engine that does not answer is a `problem`: everything is left as it is until it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from orchestrator.errors import SetupFailed
from orchestrator.runtimes import containers
from orchestrator.runtimes import output as outputs
from orchestrator.runtimes.chosen import Chosen, missing, unless_hidden
from orchestrator.runtimes.containers import EngineOptions, Marks, Seen
from orchestrator.runtimes.driver import Absence, Handle, Launch, Listener, StartFailed, Unreachable
from orchestrator.runtimes.ending import Ending
from orchestrator.runtimes.engine_api import OLDEST_API, EngineApi, Event, Refused, version_key
from orchestrator.runtimes.pins import Pins
from orchestrator.runtimes.reach import Reach
from orchestrator.runtimes.records import BLANK, SHORT_ID, Record

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Interval of full looks at what runs [s]."""
STARTS_AT_ONCE = 4
SWEEP_POLL_S = 0.1


class Container(Ending):
    """A live container and the event of its end; see `driver.Handle`."""

    def __init__(self, container: str, replica: str, url: str, signal: Callable[[Container, str], Awaitable[None]]) -> None:
        super().__init__()
        self.id = container
        self.replica = replica
        self.url = url
        self._signal = signal

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL for one that has not ended after the grace time."""
        # Not the engine's own "stop", which would hold a connection and a thread for the whole grace time.
        await self._signal(self, "SIGTERM")
        if not await self.wait(grace_s):
            await self._signal(self, "SIGKILL")
            await self.wait(grace_s)

    def release(self) -> None:
        """Containers are watched all together; see `Engine.close`."""


class Engine:
    """Driver over one Docker engine; see `driver.Driver`."""

    def __init__(self, options: EngineOptions, pins: Pins) -> None:
        self._options = options
        self._api = EngineApi(options.url)
        self._images = Chosen(options, pins, self._api)
        self._label = f"{containers.SCOPE}={options.scope}"
        self._containers: dict[str, Container] = {}
        """By id; from their creation until nothing remains of them."""
        self._creating: set[str] = set()
        """Names of containers that we have asked for and know no id of yet."""
        self._starts = asyncio.Semaphore(STARTS_AT_ONCE)
        self._watching: asyncio.Task[None] | None = None
        self._reach = Reach(f"the engine at {self._api.url}", self._api.connect)

    @property
    def problem(self) -> str | None:
        """See `Driver`."""
        return self._reach.problem

    def specification(self, launch: Launch) -> str:
        """See `Driver`: the id of the image and everything in the container's description that replicas share."""
        return launch.specification(containers.body(self._options, BLANK, launch, self._images.image(launch) or ""))

    # --- beginning and end -------------------------------------------------------------------------------------------------

    async def open(self, listener: Listener) -> None:
        """See `Driver`."""
        self._reach.listener = listener
        try:
            with _setting_up():
                await self._check()
        except SetupFailed:
            self._api.close()
            raise

    async def find(self, known: Sequence[Record]) -> list[tuple[Record, Handle]]:
        """See `Driver`; a container is known by its labels, so nothing need have been written down."""
        with _setting_up():
            running: list[tuple[Seen, Marks]] = []
            for seen in await self._list():
                marks = containers.read(seen.labels)
                if seen.runs and marks is not None:
                    running.append((seen, marks))
                else:
                    await self._remove_leftover(seen)
            found = await asyncio.gather(*(self._take_up(seen, marks) for seen, marks in running))
        self._watching = asyncio.create_task(self._reach.watch(self._follow))
        return found

    async def close(self) -> None:
        """See `Driver`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._api.close()

    def absent(self, node: str) -> Absence | None:
        """See `Driver`: every node is a share of the engine's machine."""
        return None

    @property
    def has_news(self) -> bool:
        """See `Driver`."""
        return self._images.has_news

    async def refresh(self) -> None:
        """See `Driver`: use what the names of the images stand for now."""
        await self._images.refresh()
        self._reach.changed()

    def revert(self) -> None:
        """See `Driver`: back to the images before."""
        self._images.revert()
        self._reach.changed()

    def keep(self) -> None:
        """See `Driver`."""
        self._images.keep()

    async def _check(self) -> None:
        options = self._options
        version = await self._api.connect()
        if version_key(version) < version_key(OLDEST_API):
            raise SetupFailed(
                f"the engine at {self._api.url} speaks version {version} of its API, and {OLDEST_API} is needed: "
                "install Docker Engine 20.10 or later"
            )
        await self._images.check()
        if not await unless_hidden(self._api.has_network(options.network)):
            raise SetupFailed(
                f"there is no network {options.network} on this engine: docker compose up makes it, or "
                f"docker network create {options.network}"
            )
        if not options.binds and not await unless_hidden(self._api.has_volume(options.models)):
            raise SetupFailed(
                f"there is no volume {options.models} on this engine: docker compose up exports the models into it"
            )

    async def _take_up(self, seen: Seen, marks: Marks) -> tuple[Record, Handle]:
        document = await self._api.inspect(seen.id)
        record = Record(
            id=marks.replica, kind="stage", service=marks.service, node=marks.node, url=seen.url, generation=marks.generation,
            specification=marks.specification, container=seen.id, **containers.reserved(document),
        )  # fmt: skip
        return record, self._register(seen.id, record.id, seen.url)

    # --- a replica's life --------------------------------------------------------------------------------------------------

    async def start(self, record: Record, launch: Launch, output: Path) -> tuple[Record, Handle]:
        """See `Driver`."""
        name = containers.name_of(self._options, record.id)
        self._creating.add(name)
        try:
            async with self._starts:
                outputs.begin(output)
                image = self._images.image(launch)
                if image is None:
                    raise StartFailed(missing(self._options.image_for(launch)))
                record = record.model_copy(update={"specification": self.specification(launch)})
                container = await self._reach.asked(
                    self._api.create(name, containers.body(self._options, record, launch, image))
                )
                handle = self._register(container, record.id, "")
                handle.url = await self._run(handle)
        except (Refused, OSError) as error:
            raise StartFailed(str(error)) from None
        finally:
            self._creating.discard(name)
        return record.model_copy(update={"url": handle.url, "container": container}), handle

    async def _run(self, handle: Container) -> str:
        """Start a container that was created; returns its address. One that cannot be started is removed."""
        try:
            await self._reach.asked(self._api.start(handle.id))
            document = await self._reach.asked(self._api.inspect(handle.id))
        except BaseException:
            # Where this fails too, the next full look finds a container that nobody knows.
            self._containers.pop(handle.id)
            with contextlib.suppress(Refused, Unreachable):
                await self._api.remove(handle.id)
            raise
        seen = containers.inspected(document, self._options.network)
        if not seen.runs:
            handle.ended(document["State"]["ExitCode"])
        return seen.url

    async def discard(self, replica: str, output: Path, *, unasked: bool) -> None:
        """See `Driver`: keep the end of its output, and remove the container."""
        for handle in [handle for handle in self._containers.values() if handle.replica == replica]:
            try:
                text = await self._reach.asked(self._api.last_lines(handle.id, outputs.KEPT_LINES))
                outputs.keep(output, text)
                if unasked:
                    await self._tell(handle, text)
                await self._reach.asked(self._api.remove(handle.id))
            except (Refused, Unreachable):
                # It is gone already, or the next full look finds a container that nobody knows.
                continue
            finally:
                self._containers.pop(handle.id, None)

    async def _tell(self, handle: Container, text: str) -> None:
        outputs.tell(handle.replica, text)
        document = await self._reach.asked(self._api.inspect(handle.id))
        if document["State"].get("OOMKilled"):
            limit = document["HostConfig"]["Memory"] // 2**20
            log.warning("%s ran out of its %d MiB of memory; give its service more in the testbed file", handle.replica, limit)

    async def _signal(self, handle: Container, signal: str) -> None:
        """Send a signal as soon as the engine answers; a container that is gone already is fine."""
        while not handle.exited.is_set():
            try:
                await self._reach.asked(self._api.kill(handle.id, signal))
            except Refused as refused:
                if refused.status not in (404, 409):  # gone, or not running: the event of its end is on its way
                    log.warning("%s: %s was refused: %s", handle.replica, signal, refused)
                return
            except Unreachable:
                await self._reach.answers.wait()
            else:
                return

    def _register(self, container: str, replica: str, url: str) -> Container:
        # From its creation on, so that not even the end of one that dies at once is missed.
        self._containers[container] = Container(container, replica, url, self._signal)
        return self._containers[container]

    # --- watching -----------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Watch through one stream of events.

        Raises:
            Unreachable: it broke, or the engine does not answer.
        """
        # The stream first: what happens between the two is then an event, and what happened before is in the list.
        stream = await self._api.events({"label": [self._label], "type": ["container"]}, self._hear, self._reach.wake.set)
        try:
            while not stream.ended:
                await self._look()
                self._reach.found()
                self._reach.wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._reach.wake.wait()
        finally:
            await stream.close()
        raise Unreachable(f"{self._reach.who} ended its stream of events")

    def _hear(self, event: Event) -> None:
        actor = event.get("Actor") or {}
        handle = self._containers.get(actor.get("ID", ""))
        if handle is not None and event.get("Action") == "die":
            code = str((actor.get("Attributes") or {}).get("exitCode", ""))
            handle.ended(int(code) if code.isdigit() else None)

    async def _look(self) -> None:
        """Compare what is known with what there is, and bring every handle up to date."""
        # Only what was there before the question can be missing from the answer.
        known, creating = dict(self._containers), set(self._creating)
        there = {seen.id: seen for seen in await self._list()}
        for handle in known.values():
            await self._bring_up_to_date(handle, there.get(handle.id))
        for seen in there.values():
            if seen.id not in known and seen.id not in self._containers and seen.name not in creating | self._creating:
                await self._remove_leftover(seen)

    async def _bring_up_to_date(self, handle: Container, seen: Seen | None) -> None:
        if seen is None:
            handle.ended(None)
        elif seen.state in ("exited", "dead") and not handle.exited.is_set():
            handle.ended((await self._api.inspect(handle.id))["State"]["ExitCode"])
        elif seen.url and handle.url and seen.url != handle.url:
            handle.url = seen.url
            if self._reach.listener is not None:
                self._reach.listener.moved(handle.replica, seen.url)

    async def _remove_leftover(self, seen: Seen) -> None:
        log.warning("container %s (%s, %s) is left over; removed", seen.name, seen.id[:SHORT_ID], seen.state)
        with contextlib.suppress(Refused):
            await self._api.remove(seen.id)

    async def _list(self) -> list[Seen]:
        return [containers.listed(entry, self._options.network) for entry in await self._api.containers(self._label)]


async def sweep(scope: str, grace_s: float) -> int:
    """Stop and remove every container of a scope whose orchestrator is gone; returns how many there were.

    Raises:
        Unreachable: the engine does not answer.
    """
    api, label = EngineApi(), f"{containers.SCOPE}={scope}"
    try:
        await api.connect()
        found = {entry["Id"] for entry in await api.containers(label)}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await _all_over(api, label, "SIGTERM")
        for container in found:
            with contextlib.suppress(Refused):  # somebody else has removed it
                await api.remove(container)
        return len(found)
    finally:
        api.close()


async def _all_over(api: EngineApi, label: str, signal: str) -> None:
    """Send a signal to all containers with a label and wait until none of them runs."""
    told: set[str] = set()
    while running := {entry["Id"] for entry in await api.containers(label) if entry["State"] == "running"}:
        for container in running - told:
            with contextlib.suppress(Refused):  # it has ended in the meantime
                await api.kill(container, signal)
        told |= running
        await asyncio.sleep(SWEEP_POLL_S)


@contextlib.contextmanager
def _setting_up() -> Iterator[None]:
    """What goes wrong before first use, in the words of whoever brings the system up."""
    try:
        yield
    except Unreachable as error:
        raise SetupFailed(f"{error}; start Docker, name another engine by DOCKER_HOST, or use the processes runtime") from None
    except Refused as refused:
        raise SetupFailed(f"the engine refuses what is needed of it: {refused}") from None
