"""The one seam to HTTP between processes of the data plane: keep-alive HTTP/1.1 over asyncio, parsed by httptools.

A hop's cost is a product feature here: docs/decisions.md says what httpx, aiohttp and this take. The parser is llhttp, as in
uvicorn; ours are the pool, one request at a time on each connection, and the mapping of everything that can go wrong to
`Unreachable` or `TimedOut`. An answer of any status is an answer.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import urlsplit

import httptools

IDLE_S = 30.0
"""Age at which an idle connection is given up: well before the servers' 75 s, so a request seldom meets a closing one."""
IDLE_PER_HOST = 512
CONNECT_TIMEOUT_S = 1.0
ANSWER_BYTES = 64 << 20
"""Largest answer taken in; a server that sends more is cut off."""
AHEAD_BYTES = 64 << 10
"""Of a streamed answer, how much may lie unread here before the connection is read no more."""


class Unreachable(Exception):
    """No answer came: connection refused, broken off, or not HTTP. Whoever was asked is gone or going."""


class TimedOut(Exception):
    """No answer came within the time given; the connection has been closed, so the other side knows."""


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """Status, headers (names in lower case) and whole body of an answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """Keep-alive connections to other processes. Use as an async context manager; closing it closes them all."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, int], list[_Connection]] = defaultdict(list)
        self._open: set[_Connection] = set()
        self._targets: dict[str, tuple[str, int, bytes]] = {}

    async def __aenter__(self) -> Transport:
        """Nothing is opened before it is needed."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection; whoever still waits for an answer gets Unreachable."""
        for connection in list(self._open):
            connection.close()

    async def get(self, url: str, timeout_s: float) -> HttpAnswer:
        """As `post`, without a body."""
        return await self._request(b"GET", url, (), {}, timeout_s)

    async def post(
        self, url: str, body: bytes | Sequence[bytes | memoryview], headers: Mapping[str, str], timeout_s: float
    ) -> HttpAnswer:
        """Send a request and wait for the whole answer. Cancelling the call closes its connection.

        Args:
            url: http://HOST:PORT/PATH.
            body: the body, in one piece or several.
            headers: beside Host and Content-Length.
            timeout_s: limit on all of it [s].

        Raises:
            Unreachable: no connection, or it broke before the answer was complete.
            TimedOut: `timeout_s` passed first.
        """
        return await self._request(b"POST", url, (body,) if isinstance(body, bytes) else body, headers, timeout_s)

    async def stream(
        self, url: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str], timeout_s: float
    ) -> HttpAnswer | StreamedAnswer:
        """As `post`, but for a 200 only until its headers have arrived: its body is read in pieces, and must be closed.

        Any other status is an answer in the ordinary way. `timeout_s` is the limit until the headers, or for an ordinary
        answer until all of it.
        """
        host, port, head = self._head(b"POST", url, body, headers)
        due = time.monotonic() + timeout_s
        while True:
            connection, reused = await self._connect(host, port, timeout_s)
            answer = StreamedAnswer(connection, functools.partial(self._give_back, host, port, connection))
            try:
                await connection.begin((head, *body), answer, max(due - time.monotonic(), 0.0))
            except BaseException as error:
                answer.close()
                if isinstance(error, TimeoutError):
                    raise TimedOut(f"{url}: no answer within {timeout_s:.3f} s") from None
                if isinstance(error, ConnectionError):
                    if reused and not connection.heard:
                        continue
                    raise Unreachable(f"{url}: {error}") from None
                raise
            if answer.status == 200:
                return answer
            whole = HttpAnswer(answer.status, answer.headers, answer.taken())
            answer.close()
            return whole

    def _head(
        self, method: bytes, url: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str]
    ) -> tuple[str, int, bytes]:
        host, port, target = self._target(url)
        lines = b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items())
        return host, port, b"%b %b%bcontent-length: %d\r\n\r\n" % (method, target, lines, sum(map(len, body)))

    async def _request(
        self,
        method: bytes,
        url: str,
        body: Sequence[bytes | memoryview],
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> HttpAnswer:
        host, port, head = self._head(method, url, body, headers)
        due = time.monotonic() + timeout_s
        while True:
            connection, reused = await self._connect(host, port, timeout_s)
            try:
                answer = await connection.exchange((head, *body), max(due - time.monotonic(), 0.0))
            except TimeoutError:
                raise TimedOut(f"{url}: no answer within {timeout_s:.3f} s") from None
            except ConnectionError as error:
                # The server may close an idle connection at the moment we use it; the request was not read then, and a
                # fresh connection tells whether the server is there at all.
                if reused and not connection.heard:
                    continue
                raise Unreachable(f"{url}: {error}") from None
            finally:
                self._give_back(host, port, connection)
            return answer

    def _target(self, url: str) -> tuple[str, int, bytes]:
        known = self._targets.get(url)
        if known is None:
            parts = urlsplit(url)
            if parts.scheme != "http" or not parts.hostname:
                raise Unreachable(f"{url}: not an http:// address")
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            known = (parts.hostname, parts.port or 80, f"{path or '/'} HTTP/1.1\r\nhost: {parts.netloc}\r\n".encode())
            if len(self._targets) >= IDLE_PER_HOST:
                self._targets.clear()  # long polls carry a version in their address: keep the cache bounded
            self._targets[url] = known
        return known

    async def _connect(self, host: str, port: int, timeout_s: float) -> tuple[_Connection, bool]:
        idle = self._idle[host, port]
        oldest = time.monotonic() - IDLE_S
        while idle:
            connection = idle.pop()
            if connection.usable and connection.since > oldest:
                return connection, True
            connection.close()
        try:
            async with asyncio.timeout(min(timeout_s, CONNECT_TIMEOUT_S)):
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(lambda: _Connection(self._open), host, port)
        except TimeoutError:
            if timeout_s < CONNECT_TIMEOUT_S:
                raise TimedOut(f"{host}:{port}: no connection within {timeout_s:.3f} s") from None
            raise Unreachable(f"{host}:{port}: no connection within {CONNECT_TIMEOUT_S} s") from None
        except OSError as error:
            raise Unreachable(f"{host}:{port}: {error}") from None
        return connection, False

    def _give_back(self, host: str, port: int, connection: _Connection) -> None:
        idle = self._idle[host, port]
        if connection.usable and len(idle) < IDLE_PER_HOST:
            connection.since = time.monotonic()
            idle.append(connection)
        else:
            connection.close()


class StreamedAnswer:
    """An answer that is read while it arrives. `close` it in any case: before its end that tells the other side to stop."""

    def __init__(self, connection: _Connection, give_back: Callable[[], None]) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parser: httptools.HttpResponseParser | None = None
        self._connection = connection
        self._give_back = give_back
        self._pieces: list[bytes] = []
        self._size = 0
        self._paused = False
        self._complete = self._closed = False
        self._error: ConnectionError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self, timeout_s: float) -> bytes:
        """What has arrived since the last call, at least one byte; b"" at the end.

        Raises:
            Unreachable: the connection broke before the end.
            TimedOut: nothing came for so long.
        """
        try:
            if not self._pieces and not self._complete:
                await self._wait(timeout_s)
        except TimeoutError:
            raise TimedOut(f"nothing came for {timeout_s:.3f} s") from None
        except ConnectionError as error:
            raise Unreachable(str(error)) from None
        return self.taken()

    def taken(self) -> bytes:
        """What lies here, which then does no more."""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces, self._size = [], 0
        if self._paused:
            self._paused = False
            self._connection.read_on(True)
        return data

    def close(self) -> None:
        """The end of it: a connection whose answer is complete is kept for the next request, any other is closed."""
        if not self._closed:
            self._closed = True
            self._give_back()
            self.parser = None  # which knows this answer: together they would stay until the collector comes

    async def begun(self, timeout_s: float) -> None:
        """Wait for the headers, or all of it where it is no 200; see `_Connection.begin`."""
        due = time.monotonic() + timeout_s
        while not (self._complete or self.status == 200):
            await self._wait(due - time.monotonic())

    async def _wait(self, timeout_s: float) -> None:
        if self._error is not None:
            raise self._error
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(max(timeout_s, 0.0), self._wake, TimeoutError())
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self, error: Exception | None = None) -> None:
        if self._waiter is not None and not self._waiter.done():
            if error is None:
                self._waiter.set_result(None)
            else:
                self._waiter.set_exception(error)

    def broken(self, error: ConnectionError) -> None:
        """Called by the connection when it breaks; what has arrived can still be read."""
        if not self._complete:
            self._error = error
            self._wake(error)

    # --- called by the parser -------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The status is known."""
        if self.parser is not None:
            self.status = self.parser.get_status_code()
        self._wake()

    def on_body(self, body: bytes) -> None:
        """Keep a piece until somebody reads it, and no more than so much of it."""
        self._pieces.append(body)
        self._size += len(body)
        if self.status == 200:
            if self._size > AHEAD_BYTES and not self._paused:
                self._paused = True
                self._connection.read_on(False)
            self._wake()
        elif self._size > ANSWER_BYTES:
            self._connection.close()

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self._complete = True
        self._connection.ended(self.parser is not None and self.parser.should_keep_alive())
        self._wake()


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. It is `usable` between a complete answer and the next request."""

    def __init__(self, registry: set[_Connection]) -> None:
        self.usable = True
        self.heard = False
        """Whether anything of the current answer has arrived."""
        self.since = 0.0
        self._registry = registry
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[HttpAnswer] | None = None
        self._streamed: StreamedAnswer | None = None
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._size = 0

    async def exchange(self, request: Sequence[bytes | memoryview], timeout_s: float) -> HttpAnswer:
        """Send the request and wait for its answer.

        Raises:
            ConnectionError: the connection broke first.
            TimeoutError: the time passed first.
        """
        transport = self._taken()
        self._headers, self._chunks, self._size = {}, [], 0
        self._parser = httptools.HttpResponseParser(self)
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        # One timer, where asyncio.timeout would cancel the task and sort out afterwards who did it.
        timer = loop.call_later(timeout_s, self._expire)
        # Gathered by the kernel: a tensor is not copied to stand behind its header.
        transport.writelines(request)
        try:
            return await self._answer
        finally:
            timer.cancel()

    async def begin(self, request: Sequence[bytes | memoryview], answer: StreamedAnswer, timeout_s: float) -> None:
        """Send the request and wait until the answer's headers are there, or all of it where it is no 200.

        Raises:
            ConnectionError: the connection broke first.
            TimeoutError: the time passed first.
        """
        transport = self._taken()
        self._streamed = answer
        self._parser = answer.parser = httptools.HttpResponseParser(answer)
        transport.writelines(request)
        await answer.begun(timeout_s)

    def _taken(self) -> asyncio.Transport:
        """What to send the next request by; ConnectionError where the connection has been closed meanwhile."""
        if self._transport is None or self._transport.is_closing():
            self.usable = False
            raise ConnectionResetError("the connection was closed")
        self.usable = self.heard = False
        return self._transport

    def ended(self, usable: bool) -> None:
        """The streamed answer is complete."""
        self.usable, self._streamed = usable, None

    def read_on(self, wanted: bool) -> None:
        """Whether more is to be read from the other side."""
        if self._transport is None or self._transport.is_closing():
            return
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def close(self) -> None:
        """Close at once; an answer still awaited becomes a ConnectionError."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # --- called by the event loop ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._registry.add(self)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._break(ConnectionAbortedError(f"the answer is not HTTP ({error})"))

    def connection_lost(self, error: Exception | None) -> None:
        self._registry.discard(self)
        self._break(ConnectionResetError(str(error) if error else "the server closed the connection"))

    def _expire(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TimeoutError())

    def _break(self, error: ConnectionError) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        if self._streamed is not None:
            self._streamed.broken(error)

    # --- called by the parser -------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > ANSWER_BYTES:
            self._break(ConnectionAbortedError(f"the answer has more than {ANSWER_BYTES} bytes"))
        else:
            self._chunks.append(body)

    def on_message_complete(self) -> None:
        self.usable = self._parser.should_keep_alive()
        if self._answer is not None and not self._answer.done():
            body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            self._answer.set_result(HttpAnswer(self._parser.get_status_code(), self._headers, body))
