"""Runs an app under uvicorn: one process, one event loop, a socket of its own or an inherited one, and a drain on SIGTERM.

Draining: readiness goes first, so that routers stop choosing this process; stragglers whose itinerary still names it are
answered; once nothing has been in flight for a moment, the sockets close and the process exits.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import socket
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from services.dataplane.errors import BadRequest, TaskError, TooLarge
from services.hotpath import Answer, Endpoint, Front, Request, Stream

log = logging.getLogger(__name__)

QUIET_S = 0.5
"""Nothing in flight for this long ends the drain early."""
_POLL_S = 0.05
KEEP_ALIVE_S = 75
"""Longest a connection may be idle between two requests [s]."""
WATCH_S = 5.0
"""Seconds between two looks at how long a connection has been at what it is at."""
READ_S = 30.0
"""Longest time from a connection's start, or a request's first byte, to the request's last; then the connection is cut."""
WRITE_S = 30.0
"""Longest time a client may leave a streamed answer unread once the buffers on the way are full; then the connection is cut."""
HEADER_BYTES = 64 << 10
"""Most bytes of a request's headers (and of one data chunk more, before it is noticed)."""
HEADERS_TOO_LARGE = 431
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


class HotProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with a short way for hot requests: read whole, answered by an endpoint, sent in one write.

    uvicorn writes an answer's head and body apart, and each write wakes the reader; it also builds a scope, a cycle and two
    events that an endpoint has no use for. Requests that no endpoint takes go uvicorn's own way. A request that comes before
    the one in hand is answered waits in uvicorn's `pipeline`, and `cycle` is always the newest, as uvicorn has it.
    """

    reading: _HotCycle | None = None
    """The hot request being read,"""
    working: _HotCycle | None = None
    """and the one being answered."""

    _phase = "reading"
    """What the connection is at: `reading` a request (or waiting for its first), `working` on one, `idle` between two."""
    _since = 0.0
    """When it came into that phase [s, monotonic]."""
    _watcher: asyncio.TimerHandle | None = None
    """One slow timer per connection looks at both; a timer per request would be started and stopped for nothing."""
    _head_bytes = 0
    _in_head = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that stays silent is cut too."""
        super().connection_made(transport)
        self._since = time.monotonic()
        self._watcher = self.loop.call_later(WATCH_S, self._watch)

    def _watch(self) -> None:
        limit_s = {"reading": READ_S, "idle": KEEP_ALIVE_S}.get(self._phase, math.inf)
        if time.monotonic() - self._since > limit_s:
            self.transport.abort()
        else:
            self._watcher = self.loop.call_later(WATCH_S, self._watch)

    def on_message_begin(self) -> None:
        """Keep what headers need; uvicorn's scope is made only for requests that go its way."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._head_bytes = 0
        self._in_head = True
        if self._phase == "idle":
            self._phase, self._since = "reading", time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, which bounds neither the number of headers nor the length of one."""
        if self._in_head and self._head_bytes > HEADER_BYTES:
            self.send_400_response("")
            return
        before = self._head_bytes
        super().data_received(data)
        if self._in_head and self._head_bytes == before:
            self._head_bytes += len(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; too many of them end the parsing."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEADER_BYTES:
            raise OverflowError
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser gives up: the one error shape here too, and the end of the connection."""
        if self.transport.is_closing():
            return
        error: TaskError = BadRequest("the request is not valid HTTP")
        status = error.status
        if self._in_head and self._head_bytes > HEADER_BYTES:
            error, status = TooLarge(f"the headers have more than {HEADER_BYTES} bytes"), HEADERS_TOO_LARGE
        body = orjson.dumps(error.body())
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def on_headers_complete(self) -> None:
        """Take the request, or hand it to uvicorn."""
        self._in_head = False
        found = None
        if isinstance(self.app, Front) and self.parser.get_method() == b"POST" and not self.parser.should_upgrade():
            found = self.app.endpoint(self.url)
        if found is None:
            url, headers, expects = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expects
            self.headers.extend(headers)
            super().on_headers_complete()
            return
        if self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.reading = _HotCycle(self, *found, before=self.cycle)
        self.cycle = self.reading  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """Keep a hot request's body up to its limit."""
        if self.reading is not None:
            self.reading.receive(body)
        elif not isinstance(self.cycle, _HotCycle):
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Start on a hot request, or let it wait for its turn."""
        self._phase = "working"
        if self.reading is not None:
            hot, self.reading = self.reading, None
            if hot.waits:
                self.flow.pause_reading()
                self.pipeline.appendleft((hot, self.app))  # type: ignore[arg-type]
            else:
                hot.start()
        elif not isinstance(self.cycle, _HotCycle):
            super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Called by uvicorn with what waited in the pipeline."""
        if isinstance(cycle, _HotCycle):
            cycle.start()
        else:
            super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, and with it the wish for an answer."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self.working is not None:
            self.working.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Called when an answer has been sent: on with what waits, or idle."""
        if not self.pipeline:
            self._phase, self._since = "idle", time.monotonic()
        if self.pipeline or not isinstance(self.cycle, _HotCycle):
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1


class _HotCycle:
    """A hot request from its headers to its answer. Its public attributes are those uvicorn looks for in a cycle."""

    message_event = asyncio.Event()
    """uvicorn sets it when the connection is lost; nobody here waits for it."""

    def __init__(self, protocol: HotProtocol, endpoint: Endpoint, parameters: Mapping[str, str], before: Any) -> None:
        self.response_complete = False
        self.disconnected = False
        self.keep_alive = protocol.parser.should_keep_alive()
        self._protocol = protocol
        self._endpoint = endpoint
        self._parameters = parameters
        self._before = before
        self._arrived = time.monotonic()
        self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in protocol.headers}
        self._chunks: list[bytes] = []
        self._left = endpoint.body_limit
        self._refusal: Answer | None = None
        self._task: asyncio.Task[None] | None = None
        announced = self._headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > endpoint.body_limit:
            self._refuse(f"{announced[:20]} bytes")

    @property
    def waits(self) -> bool:
        """Whether the request before this one on the connection has not been answered yet."""
        return self._before is not None and not self._before.response_complete

    def receive(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._left -= len(body)
        if self._left >= 0:
            self._chunks.append(body)
        elif self._refusal is None:
            self._refuse(f"more than {self._endpoint.body_limit} bytes")

    def start(self) -> None:
        """The request is complete and its turn has come: answer it, in a task of its own."""
        self._before = None
        if self.response_complete:
            return
        if self._refusal is not None:
            self._send(self._refusal)
            return
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        request = Request(self._parameters, self._headers, body, self._arrived)
        self._protocol.working = self
        self._task = self._protocol.loop.create_task(self._answer(request))
        self._protocol.tasks.add(self._task)
        self._task.add_done_callback(self._protocol.tasks.discard)

    def cancel(self) -> None:
        """The client has gone."""
        self.disconnected = True
        if self._task is not None:
            self._task.cancel()

    async def _answer(self, request: Request) -> None:
        answer = await self._endpoint.answer(request)
        if isinstance(answer, Answer):
            self._send(answer)
        else:
            await self._stream(answer)

    async def _stream(self, answer: Stream) -> None:
        """Send an answer in pieces, no faster than the client reads it."""
        protocol = self._protocol
        # The parser is gone where the client is; then the pieces are begun and cancelled, so that whoever makes them knows.
        chunked = protocol.parser is None or protocol.parser.get_http_version() != "1.0"
        self.keep_alive = self.keep_alive and chunked
        head = self._head(answer.status, answer.headers)
        head.append(b"transfer-encoding: chunked\r\n\r\n" if chunked else b"\r\n")
        front = b"".join(head)
        try:
            async for piece in answer.pieces:
                protocol.transport.write(b"%b%x\r\n%b\r\n" % (front, len(piece), piece) if chunked else front + piece)
                front = b""
                if protocol.flow.write_paused:
                    async with asyncio.timeout(WRITE_S):
                        await protocol.flow.drain()
            protocol.transport.write(front + (b"0\r\n\r\n" if chunked else b""))
        except TimeoutError:
            log.warning("a client left a streamed answer unread for %.0f s", WRITE_S)
            protocol.transport.abort()
        except Exception as error:  # the head is out: nothing can be told any more but that this is not the end
            log.error("a streamed answer failed", exc_info=error)
            protocol.transport.abort()
        finally:
            await answer.pieces.aclose()
        self._end()

    def _refuse(self, size: str) -> None:
        """A body over the limit: say so without reading the rest of it, at once if nobody is before it."""
        self.keep_alive = False
        self._chunks.clear()
        error = TooLarge(f"the body has {size}; the limit is {self._endpoint.body_limit}")
        self._refusal = self._endpoint.refuse(error)
        if not self.waits:
            self._send(self._refusal)

    def _send(self, answer: Answer) -> None:
        if not (self.disconnected or self._protocol.transport.is_closing()):
            head = self._head(answer.status, answer.headers)
            head.append(b"content-length: %d\r\n\r\n" % len(answer.body))
            self._protocol.transport.write(b"".join((*head, answer.body)))
        self._end()

    def _head(self, status: int, headers: list[tuple[bytes, bytes]]) -> list[bytes]:
        head = [STATUS_LINE[status]]
        for name, value in headers:
            head += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            head.append(b"connection: close\r\n")
        return head

    def _end(self) -> None:
        """The answer is out; on with what waits on the connection, if it is still there."""
        protocol = self._protocol
        self.response_complete = True
        protocol.working = None
        if self.disconnected or protocol.transport.is_closing():
            return
        if not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()


def listen(host: str, port: int, fd: int | None = None) -> socket.socket:
    """A listening socket: the inherited one where `fd` is given, else a new one (port 0 takes any that is free)."""
    if fd is not None:
        return socket.socket(fileno=fd)
    return socket.create_server((host, port), backlog=1024)


def configuration(app: ASGIApp, grace_s: float) -> uvicorn.Config:
    """How uvicorn serves an app here: one way for every process and for the tests."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=HotProtocol,
        # uvicorn would wrap the app to trust such headers, and its protocol could not see the Front any more.
        proxy_headers=False,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )


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
    # What is loaded by now stays for good: the collector need not walk it again in the middle of a task.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    DrainingServer(configuration(app, grace_s), application, grace_s).run(sockets=[listener])
