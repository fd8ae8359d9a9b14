"""The way of tensors past FastAPI: plain ASGI callables in front of the app, and the one place where errors become answers.

Between two runs of an encoder, which sweep 90 MB of weights through the caches, every line of code a request touches comes from
memory; so the hot path takes the shortest way, and everything that is not on the way of tensors stays FastAPI's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from services.dataplane.errors import BadRequest, InternalFailure, TaskError, TooLarge

log = logging.getLogger(__name__)

R = TypeVar("R")

JSON = (b"content-type", b"application/json")
CLIENT_CLOSED = 499
"""Never sent, only counted: the client is gone. (nginx's number.)"""

WATCH_AFTER_S = 0.02
"""Age of a request from which its connection is watched: a client that leaves is noticed this late at most."""

Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers without the length, body."""


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


def headers_of(scope: Scope) -> dict[str, str]:
    """Header names (lower case, as ASGI gives them) -> values; of a repeated header the last."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """The whole body of a request.

    Raises:
        TooLarge: it has, or says it has, more than `limit` bytes; nothing of the excess is kept.
        ClientGone: the client left in the middle.
    """
    announced = headers.get("content-length", "0")
    if announced.isascii() and announced.isdecimal() and int(announced[:20]) > limit:
        raise TooLarge(f"the body has {announced[:20]} bytes; the limit is {limit}")
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > limit:
            raise TooLarge(f"the body has {len(body)} bytes; the limit is {limit}")
        return body
    chunks: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise TooLarge(f"the body has more than {limit} bytes, which is the limit")
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()


async def while_connected(work: Coroutine[Any, Any, R], receive: Receive) -> R:
    """Await `work`, but cancel it when the client closes its connection. Call it once the body has been read.

    Somebody watches the connection only from WATCH_AFTER_S on, since most requests are answered sooner.

    Raises:
        ClientGone: the client left; `work` has been cancelled and has finished its clean-up.
    """
    watch = _Watch(receive)
    timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, watch.start)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.gone:
            # Only our own cancellation becomes an exception; one from outside (the server stopping) goes on up.
            watch.task.uncancel()
            raise ClientGone from None
        raise
    finally:
        timer.cancel()
        watch.stop()


class _Watch:
    """Waits for the client to leave, and cancels the task that made it."""

    def __init__(self, receive: Receive) -> None:
        task = asyncio.current_task()
        if task is None:  # pragma: no cover - a coroutine always runs in a task
            raise RuntimeError("while_connected runs inside a task")
        self.task = task
        self.gone = False
        self._receive = receive
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watcher = asyncio.ensure_future(self._until_gone())

    def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.task.cancel()


async def send_answer(send: Send, answer: Answer) -> None:
    """Send status, headers and body, with the length."""
    status, headers, body = answer
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_answer(error: TaskError, shape: Callable[[TaskError], dict[str, Any]] = TaskError.body) -> Answer:
    """The one way an error is told: its status, its JSON object, Retry-After where it knows one."""
    return error.status, [JSON, *error.headers()], orjson.dumps(shape(error))


def unexpected(error: Exception, what: str) -> InternalFailure:
    """A fault of ours: the trace goes to the log, the client learns only that it happened."""
    log.error("%s failed", what, exc_info=error)
    return InternalFailure(f"internal error ({type(error).__name__}); the server's log has the details")


class Front:
    """Hands hot requests (by method and path) to their endpoints, and everything else to the FastAPI app behind it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._infer: ASGIApp | None = None
        self._exact: dict[str, ASGIApp] = {}

    def open(self, infer: ASGIApp, exact: Mapping[str, ASGIApp] | None = None) -> None:
        """Serve `POST /v2/models/MODEL[/versions/VERSION]/infer` by `infer`, and POSTs of these exact paths by theirs."""
        self._infer = infer
        self._exact = dict(exact or {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            if self._infer is not None and path.endswith("/infer") and path.startswith("/v2/models/"):
                parts = path.split("/")
                if len(parts) == 5:
                    scope["path_params"] = {"model": parts[3]}
                    return await self._infer(scope, receive, send)
                if len(parts) == 7 and parts[4] == "versions":
                    scope["path_params"] = {"model": parts[3], "version": parts[5]}
                    return await self._infer(scope, receive, send)
            elif (endpoint := self._exact.get(path)) is not None:
                return await endpoint(scope, receive, send)
        return await self._app(scope, receive, send)


class Endpoint:
    """An ASGI callable made of `answer(scope, receive) -> Answer`; errors become answers here and nowhere else."""

    def __init__(
        self,
        answer: Callable[[Scope, Receive], Awaitable[Answer]],
        shape: Callable[[TaskError], dict[str, Any]] = TaskError.body,
    ) -> None:
        self._answer = answer
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        try:
            answer = await self._answer(scope, receive)
        except TaskError as error:
            answer = error_answer(error, self._shape)
        except ClientGone:
            return
        except UnicodeDecodeError:
            answer = error_answer(BadRequest("a text in the request is not UTF-8"), self._shape)
        except Exception as error:  # the boundary: whatever it was, the service goes on
            answer = error_answer(unexpected(error, scope["path"]), self._shape)
        await send_answer(send, answer)
