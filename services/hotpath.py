"""The way of tensors past FastAPI: endpoints from whole request to whole answer, and the one place where errors become answers.

Between two runs of an encoder, which sweep its weights through the caches, every line of code that a request touches comes
from memory; so the hot path takes the shortest way (`services.server` calls it as soon as a request is complete), and
everything that is not on the way of tensors stays FastAPI's. A client that closes its connection cancels the endpoint's task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from services.dataplane import wire
from services.dataplane.errors import InternalFailure, TaskError

log = logging.getLogger(__name__)

JSON = (b"content-type", b"application/json")
KNOWN_PATHS = 1024
"""Paths remembered with their endpoint; anybody may ask for any number of others."""


class Request(NamedTuple):
    """A request that has been read."""

    parameters: Mapping[str, str]
    """What the path names: `model`, perhaps `version`."""
    headers: Mapping[str, str]
    """Names in lower case; of a repeated header the last value."""
    body: bytes
    arrived: float
    """When its headers were complete [s, monotonic]."""


class Answer(NamedTuple):
    """Status, headers without the length, body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Stream(NamedTuple):
    """An answer that is sent while it is made: status and headers with the first piece, then one chunk a piece.

    The pieces are iterated as soon as the endpoint returns, and closed whatever happens. Whoever makes them tells errors among
    them; what they raise cuts the connection. The next piece is asked for when there is room for it on the way.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    pieces: AsyncGenerator[bytes]


def content(header_length: int | None) -> list[tuple[bytes, bytes]]:
    """Headers of an answer whose body `wire` has encoded: its type, and the length of its JSON part where tensors follow."""
    media, headers = wire.media_type(header_length)
    return [(b"content-type", media.encode()), *((name.encode(), value.encode()) for name, value in headers.items())]


ErrorShape = Callable[[TaskError], dict[str, Any]]


class Endpoint:
    """Serves one hot path. Whatever `work` raises becomes an answer here and nowhere else."""

    def __init__(
        self, work: Callable[[Request], Awaitable[Answer | Stream]], *, body_limit: int, shape: ErrorShape = TaskError.body
    ) -> None:
        self.body_limit = body_limit
        self._work = work
        self._shape = shape

    async def answer(self, request: Request) -> Answer | Stream:
        """The answer, come what may; only cancellation passes."""
        try:
            return await self._work(request)
        except TaskError as error:
            return self.refuse(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the boundary: whatever it was, the service goes on
            log.error("a request failed", exc_info=error)
            return self.refuse(InternalFailure.of(error))

    def refuse(self, error: TaskError) -> Answer:
        """The one way an error is told: its status, its JSON object, Retry-After where it knows one."""
        return Answer(error.status, [JSON, *error.headers()], orjson.dumps(self._shape(error)))


class Front:
    """An app in two parts: hot endpoints by path, for POST, and the FastAPI app for everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._infer: Endpoint | None = None
        self._exact: dict[str, Endpoint] = {}
        self._known: dict[bytes, tuple[Endpoint, Mapping[str, str]] | None] = {}

    def open(self, infer: Endpoint, exact: Mapping[str, Endpoint] | None = None) -> None:
        """Serve `POST /v2/models/MODEL[/versions/VERSION]/infer` by `infer`, and POSTs of these exact paths by theirs."""
        self._infer = infer
        self._exact = dict(exact or {})
        self._known.clear()

    def endpoint(self, target: bytes) -> tuple[Endpoint, Mapping[str, str]] | None:
        """The endpoint of a request target and what its path names; None where FastAPI should answer."""
        try:
            return self._known[target]
        except KeyError:
            if len(self._known) >= KNOWN_PATHS:
                self._known.clear()
            found = self._known[target] = self._find(target)
            return found

    def _find(self, target: bytes) -> tuple[Endpoint, Mapping[str, str]] | None:
        path = unquote(target.partition(b"?")[0].decode("latin-1"))
        if path in self._exact:
            return self._exact[path], {}
        match path.split("/"):
            case ["", "v2", "models", model, "infer"] if self._infer is not None:
                return self._infer, {"model": model}
            case ["", "v2", "models", model, "versions", version, "infer"] if self._infer is not None:
                return self._infer, {"model": model, "version": version}
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: FastAPI's part."""
        await self._app(scope, receive, send)
