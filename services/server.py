"""Runs an app under uvicorn: one process, one event loop, a socket of its own or an inherited one, and a drain on SIGTERM.

Draining: readiness goes first, so that routers stop choosing this process; stragglers whose itinerary still names it are
answered; once nothing has been in flight for a moment, the sockets close and the process exits.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

QUIET_S = 0.5
"""Nothing in flight for this long ends the drain early."""
_POLL_S = 0.05
GC_THRESHOLDS = (20_000, 20, 20)
"""A request leaves no cycles; collecting after every 700 allocations, Python's default, is a pause in nearly every one."""


class Drainable(Protocol):
    """What the server asks of the application while it drains."""

    draining: bool

    @property
    def in_flight(self) -> int:
        """Requests that have not been answered yet."""


class DrainingServer(uvicorn.Server):
    """uvicorn, but a first SIGTERM or SIGINT drains before it stops. A second one stops at once."""

    def __init__(self, config: uvicorn.Config, application: Drainable, grace_s: float) -> None:
        super().__init__(config)
        self._application = application
        self._grace_s = grace_s
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; called by uvicorn in place of stopping."""
        if self._application.draining:
            super().handle_exit(sig, frame)
            return
        self._application.draining = True
        # A signal handler may interrupt the loop anywhere; let the loop itself start the task.
        asyncio.get_running_loop().call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._until_quiet())

    async def _until_quiet(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace_s
        quiet_since = loop.time()
        while loop.time() < end and loop.time() - quiet_since < QUIET_S:
            await asyncio.sleep(_POLL_S)
            if self._application.in_flight:
                quiet_since = loop.time()
        self.should_exit = True


class _Cork:
    """A transport that sends at the end of the event loop's turn.

    uvicorn writes an answer's head and body apart, and each write wakes the reader: along a chain of stages that is one wake-up
    and one pass through a cold event loop too many at every hop. Here the two leave in one write.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Keep the data until the turn is over."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)

    def close(self) -> None:
        """Send what waits, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._waiting:
            data, self._waiting = b"".join(self._waiting), []
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class CorkedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 over httptools, with answers in one write."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Put the cork between uvicorn and the socket."""
        super().connection_made(_Cork(transport, self.loop))  # type: ignore[arg-type]


def listen(host: str, port: int, fd: int | None = None) -> socket.socket:
    """A listening socket: the inherited one where `fd` is given, else a new one (port 0 takes any that is free)."""
    if fd is not None:
        return socket.socket(fileno=fd)
    return socket.create_server((host, port), backlog=1024)


def serve(
    app: ASGIApp,
    application: Drainable,
    listener: socket.socket,
    *,
    grace_s: float,
    announce: Callable[[str], None],
) -> None:
    """Serve until stopped.

    Args:
        app: the ASGI application.
        application: what tells how much is in flight.
        listener: where to accept connections.
        grace_s: longest drain [s].
        announce: called with the address once the socket is there.
    """
    host, port = listener.getsockname()[:2]
    announce(f"http://{host}:{port}")
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=CorkedProtocol,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    # What is loaded by now stays for good: the collector need not walk it again in the middle of a task.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    DrainingServer(config, application, grace_s).run(sockets=[listener])
