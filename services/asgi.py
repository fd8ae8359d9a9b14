"""The hot path's own endpoints, plain ASGI callables mounted on a FastAPI app, and the one place where errors become answers.

A FastAPI route costs about 100 µs more per request than these; everything that is not on the way of tensors stays FastAPI's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.types import Receive, Scope, Send

from services.dataplane.errors import BadRequest, InternalFailure, TaskError, TooLarge

log = logging.getLogger(__name__)

R = TypeVar("R")

JSON = (b"content-type", b"application/json")
CLIENT_CLOSED = 499
"""Never sent, only counted: the client is gone. (nginx's number.)"""

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
    """Await `work`, but cancel it as soon as the client closes its connection. Call it once the body has been read.

    Raises:
        ClientGone: the client left; `work` has been cancelled and has finished its clean-up.
    """
    task = asyncio.current_task()
    if task is None:  # pragma: no cover - a coroutine always runs in a task
        raise RuntimeError("while_connected runs inside a task")
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone:
            # Only our own cancellation becomes an exception; one from outside (the server stopping) goes on up.
            task.uncancel()
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()


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
