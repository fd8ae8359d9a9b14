"""The one door to the `docker` package: the few calls to a Docker engine that we make, awaitable, limited in time, never more.

Which engine is said as to `docker`: by DOCKER_HOST (with DOCKER_TLS_VERIFY and DOCKER_CERT_PATH), else by a context of the
docker command line (DOCKER_CONTEXT, or the one in use), else it is the socket of this machine.

Every call runs in a thread of our own small pool, so an engine that hangs holds up nobody but who asked. Two things can go
wrong, and callers see only these: the engine answers no (`Refused`), or it does not answer (`driver.Unreachable`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import docker
import docker.constants
import docker.context
import docker.errors
import docker.utils

from orchestrator.errors import SetupFailed
from orchestrator.runtimes.driver import Unreachable

OLDEST_API = "1.41"
"""Engine 20.10."""
ANSWER_S = 10.0
"""The engine may take this long over one answer [s]."""
CALL_S = 20.0
"""A call may take this long in all, waiting for a free thread included [s]."""
WORKERS = 8
GATEWAY_ERRORS = (502, 503, 504)
"""What a proxy before the engine says when the engine does not answer it."""
JOIN_S = 1.0

Event = Mapping[str, Any]
T = TypeVar("T")


class Refused(Exception):
    """The engine answered, and the answer is no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class EngineApi:
    """One engine; `connect` comes first."""

    def __init__(self, url: str | None = None) -> None:
        """`url` as in DOCKER_HOST; None: that of the environment, of the context in use, or the socket of this machine.

        Raises:
            SetupFailed: what the environment names does not exist, or is not whole.
        """
        self._settings = {"base_url": url} if url is not None else settings(os.environ)
        self.url = str(self._settings.get("base_url") or docker.constants.DEFAULT_UNIX_SOCKET.replace("http+", ""))
        self._version = OLDEST_API
        self._client = self._new_client()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="engine")
        self._free = asyncio.Semaphore(WORKERS)

    async def connect(self) -> str:
        """Ask for the version of the API that the engine speaks, and speak it too, as far as we can.

        Raises:
            Unreachable: there is no answer.
        """
        answer = await self._call(lambda: self._client.version(api_version=False))
        version = str(answer.get("ApiVersion", "0"))
        common = min(version, docker.constants.DEFAULT_DOCKER_API_VERSION, key=version_key)
        if common != self._version:
            self._client.close()
            self._version = common
            self._client = self._new_client()
        return version

    async def image(self, name: str) -> str | None:
        """The id of an image; None where the engine does not have it."""
        document = await self._unless_missing(lambda: self._client.inspect_image(name))
        return None if document is None else str(document["Id"])

    async def has_image(self, image: str) -> bool:
        """Whether the engine has an image."""
        return await self.image(image) is not None

    async def has_network(self, name: str) -> bool:
        """Whether there is such a network."""
        return await self._unless_missing(lambda: self._client.inspect_network(name)) is not None

    async def has_volume(self, name: str) -> bool:
        """Whether there is such a volume."""
        return await self._unless_missing(lambda: self._client.inspect_volume(name)) is not None

    async def containers(self, label: str) -> list[dict[str, Any]]:
        """Every container with this label, running or not."""
        found = await self._call(lambda: self._client.containers(all=True, filters={"label": [label]}))
        return list(found)

    async def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Create a container; returns its id."""
        answer = await self._call(lambda: self._client.create_container_from_config(dict(body), name))
        return str(answer["Id"])

    async def start(self, container: str) -> None:
        """Start a container that was created."""
        await self._call(lambda: self._client.start(container))

    async def inspect(self, container: str) -> dict[str, Any]:
        """All that is known of a container."""
        return dict(await self._call(lambda: self._client.inspect_container(container)))

    async def kill(self, container: str, signal: str) -> None:
        """Send a signal."""
        await self._call(lambda: self._client.kill(container, signal=signal))

    async def last_lines(self, container: str, lines: int) -> str:
        """The end of what it has written."""
        return bytes(await self._call(lambda: self._client.logs(container, tail=lines))).decode(errors="replace")

    async def remove(self, container: str) -> None:
        """Remove a container, running or not."""
        await self._call(lambda: self._client.remove_container(container, force=True))

    async def events(
        self, filters: Mapping[str, list[str]], hear: Callable[[Event], None], over: Callable[[], None]
    ) -> EventStream:
        """From the return on, `hear` is called in the loop for every event that the filters let pass; `over` at the end."""
        stream = EventStream(self, filters, hear, over)
        try:
            async with asyncio.timeout(ANSWER_S):
                await stream.opened
        except TimeoutError:
            raise Unreachable(f"the engine at {self.url} sends no events within {ANSWER_S:g} s") from None
        return stream

    def close(self) -> None:
        """Let go of connections and threads; one that hangs ends by its own limit."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def open_stream(self, filters: Mapping[str, list[str]]) -> Any:
        """Blocks until the engine begins to send events; for `EventStream`'s own thread."""
        with self._translated():
            return self._client.events(filters=dict(filters), decode=True)

    def _new_client(self) -> docker.APIClient:
        # By the ssh of this machine, with its keys and its configuration, and not by a second implementation.
        by_ssh = self.url.startswith("ssh://")
        try:
            client = docker.APIClient(**self._settings, version=self._version, timeout=ANSWER_S, use_ssh_client=by_ssh)
        except docker.errors.DockerException as error:
            raise SetupFailed(f"no engine can be reached by {self.url}: {error}") from None
        client.trust_env = False  # an engine is never behind the HTTP proxy of the environment
        return client

    async def _unless_missing(self, call: Callable[[], T]) -> T | None:
        try:
            return await self._call(call)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    async def _call(self, call: Callable[[], T]) -> T:
        def work() -> T:
            with self._translated():
                return call()

        try:
            async with asyncio.timeout(CALL_S), self._free:
                return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except TimeoutError:
            raise Unreachable(f"the engine at {self.url} does not answer within {CALL_S:g} s") from None

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """The package's errors, and those of the libraries below it, as our two. Theirs are OSErrors or DockerExceptions."""
        try:
            yield
        except docker.errors.APIError as error:
            status, said = error.status_code or 500, str(error.explanation or error)
            if status in GATEWAY_ERRORS:
                raise Unreachable(f"the engine behind {self.url} does not answer: {said}") from None
            raise Refused(status, said) from None
        except (OSError, docker.errors.DockerException) as error:
            raise Unreachable(f"the engine at {self.url} does not answer: {_reason(error)}") from None


class EventStream:
    """Events, read in a thread of their own until the stream breaks or is closed."""

    def __init__(
        self, api: EngineApi, filters: Mapping[str, list[str]], hear: Callable[[Event], None], over: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._api, self._filters, self._hear, self._over = api, filters, hear, over
        self._stream: Any = None
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.ended = False
        # A daemon, since the package sets no limit on the wait for the first answer.
        self._thread = threading.Thread(target=self._read, name="engine-events", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """End it, and wait until its thread is gone."""
        if self._stream is not None:
            # It may break by itself at this moment; then there is nothing left to close.
            with contextlib.suppress(OSError, AttributeError, docker.errors.DockerException):
                self._stream.close()
        await asyncio.to_thread(self._thread.join, JOIN_S)

    def _read(self) -> None:
        try:
            self._stream = self._api.open_stream(self._filters)
        except Exception as error:
            self._post(self._fail, error)
            return
        self._post(self._succeed)
        # Whatever ends it, be it a broken connection or half a line of JSON, is answered by a new stream and a full look.
        with contextlib.suppress(Exception):
            for event in self._stream:
                self._post(self._hear, event)
        self._post(self._end)

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(call, *arguments)

    def _succeed(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)

    def _end(self) -> None:
        self.ended = True
        self._over()


def settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """What an environment says of the engine, as arguments of a client: DOCKER_HOST, else a context, else nothing.

    Raises:
        SetupFailed: there is no such context, or no such certificate.
    """
    try:
        if environment.get("DOCKER_HOST"):
            return dict(docker.utils.kwargs_from_env(environment))
        name = environment.get("DOCKER_CONTEXT")
        context = docker.context.ContextAPI.get_context(name)
    except docker.errors.DockerException as error:
        raise SetupFailed(f"the engine that the environment names cannot be used: {error}") from None
    if context is None:
        raise SetupFailed(f"there is no Docker context {name or 'of the name that is in use'}: see docker context ls")
    if context.Name == "default":
        return {}
    return {"base_url": context.Host} | ({} if context.TLSConfig is None else {"tls": context.TLSConfig})


def version_key(version: str) -> tuple[int, ...]:
    """`1.41` as numbers, to compare."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _reason(error: BaseException) -> str:
    """The innermost cause, which is the one that says something."""
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__ or _wrapped(cause)) is not None:
        cause = deeper
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


def _wrapped(error: BaseException) -> BaseException | None:
    return next((part for part in reversed(error.args) if isinstance(part, BaseException)), None)
