"""How far it is to another stage: latency and bandwidth of the way there, measured from where this one stands.

Two routes beside those of tasks, on connections of their own. `POST /v2/probe/discard` reads a body and says how long it was;
`POST /v2/probe` sends such bodies to another stage and says what the way took. Size and time are bounded, and a stage makes
one measurement at a time.

A call takes time beside the link: parsers, event loops, a busy processor. What one to oneself takes is that time, so it is
taken off, and of all calls of a kind the fastest counts.
"""

from __future__ import annotations

import time

import orjson
from fastapi import FastAPI, Request
from pydantic import Field

from services.dataplane.document import Document
from services.dataplane.errors import QueueFull, TooLarge, UpstreamFailed
from services.transport import TimedOut, Transport, Unreachable

PATH, DISCARD = "/v2/probe", "/v2/probe/discard"
ECHOES = 20
"""Empty calls whose fastest is the latency."""
FIRST_BYTES, MOST_BYTES = 64 << 10, 8 << 20
"""Sizes sent, from the first, ever four times as much, until one takes long enough to be told from an empty call."""
TELLING_S = 0.1
CALL_S, ALL_S = 5.0, 8.0
"""Longest call, and longest measurement [s]."""


class Ask(Document):
    """`POST /v2/probe`."""

    url: str = Field(pattern=r"^http://[^/\s]+$", max_length=256)
    """Of the other stage."""
    own: str = Field(pattern=r"^http://[^/\s]+$", max_length=256)
    """Of this one, as others reach it."""


class Measured(Document):
    """One direction of a link."""

    latency_s: float
    bandwidth_bytes_per_s: float
    """At least this much: what little a stage itself takes to send and read is not told apart."""


async def measure(transport: Transport, url: str, own: str) -> Measured:
    """Measure the way to a stage.

    Args:
        transport: with no other traffic on its connections.
        url: of the other stage.
        own: of the one that measures.

    Raises:
        Unreachable: it does not answer.
        TimedOut: it does not answer in time.
        ValueError: it answers something else.
    """
    due = time.monotonic() + ALL_S
    alone_s = await _fastest(transport, own, due)
    there_s = await _fastest(transport, url, due)
    size, taken_s = FIRST_BYTES, 0.0
    while True:
        taken_s = await _call(transport, url, bytes(size))
        if taken_s - there_s >= TELLING_S or size == MOST_BYTES or time.monotonic() + 4 * taken_s > due:
            break
        size = min(4 * size, MOST_BYTES)
    # One more at that size, since the first one may have met a window that was still small.
    if time.monotonic() + taken_s < due:
        taken_s = min(taken_s, await _call(transport, url, bytes(size)))
    return Measured(latency_s=max(0.0, there_s - alone_s) / 2, bandwidth_bytes_per_s=size / max(taken_s - there_s, 1e-6))


async def _fastest(transport: Transport, url: str, due: float) -> float:
    """Time of the fastest of several empty calls [s]; the first one opens the connection, and does not count."""
    await _call(transport, url, b"")
    found = [await _call(transport, url, b"")]
    while len(found) < ECHOES and time.monotonic() + found[-1] < due - ALL_S / 2:
        found.append(await _call(transport, url, b""))
    return min(found)


async def _call(transport: Transport, url: str, body: bytes) -> float:
    began = time.monotonic()
    answer = await transport.post(f"{url}{DISCARD}", body, {"content-type": "application/octet-stream"}, CALL_S)
    taken_s = time.monotonic() - began
    if answer.status != 200 or orjson.loads(answer.body) != {"bytes": len(body)}:
        raise ValueError(f"{url}: HTTP {answer.status} from {DISCARD}")
    return taken_s


def add_routes(app: FastAPI) -> None:
    """Both routes."""
    busy = False

    @app.post(DISCARD)
    async def discard(request: Request) -> dict[str, int]:
        count = 0
        async for piece in request.stream():
            count += len(piece)
            if count > MOST_BYTES:
                raise TooLarge(f"the body has more than {MOST_BYTES} bytes")
        return {"bytes": count}

    @app.post(PATH)
    async def probe(ask: Ask) -> Measured:
        nonlocal busy
        if busy:
            raise QueueFull("this stage is measuring already", retry_after_s=ALL_S)
        busy = True
        try:
            async with Transport() as transport:
                return await measure(transport, ask.url, ask.own)
        except (Unreachable, TimedOut, ValueError) as error:
            raise UpstreamFailed(str(error)) from None
        finally:
            busy = False
