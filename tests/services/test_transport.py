"""The seam to HTTP, against real sockets that behave and misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services import transport
from services.transport import HttpAnswer, StreamedAnswer, TimedOut, Transport, Unreachable

Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-Name: value\r\n\r\nhi"


@asynccontextmanager
async def server(talk: Conversation) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/path"
    finally:
        listening.close()


async def request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def test_a_request_goes_out_whole_and_the_answer_comes_back_whole() -> None:
    seen = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request(reader))
        writer.write(OK)

    async with server(talk) as url, Transport() as http:
        answer = await http.post(url, b"body", {"x-request-id": "7"}, 5.0)
    assert (answer.status, answer.body, answer.headers["x-name"]) == (200, b"hi", "value")
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /path HTTP/1.1"
    assert b"x-request-id: 7" in head
    assert body == b"body"


async def test_connections_are_kept_and_an_answer_in_pieces_is_put_together() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await request(reader)
            for byte in b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n1\r\n!\r\n0\r\n\r\n":
                writer.write(bytes([byte]))
                await writer.drain()

    async with server(talk) as url, Transport() as http:
        assert [(await http.post(url, b"", {}, 5.0)).body for _ in range(3)] == [b"hi!"] * 3
    assert connections == 1


async def test_a_kept_connection_that_the_server_has_closed_is_replaced() -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request(reader)
        writer.write(OK)  # and closes, although the answer promised to keep the connection

    async with server(talk) as url, Transport() as http:
        for _ in range(5):
            assert (await http.post(url, b"", {}, 5.0)).status == 200
    assert connections == 5


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", b"this is not HTTP\r\n\r\n"])
async def test_a_server_that_breaks_off_or_talks_nonsense_is_unreachable(reply: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(reply)

    async with server(talk) as url, Transport() as http:
        with pytest.raises(Unreachable):
            await http.post(url, b"", {}, 5.0)


async def test_nobody_there_is_unreachable() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    async with server(talk) as url:
        pass
    async with Transport() as http:
        with pytest.raises(Unreachable):
            await http.post(url, b"", {}, 5.0)
        with pytest.raises(Unreachable, match="not an http"):
            await http.post("https://127.0.0.1/", b"", {}, 5.0)


async def test_time_out_and_cancellation_close_the_connection() -> None:
    closed: asyncio.Queue[bytes] = asyncio.Queue()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        closed.put_nowait(await reader.read())

    async with server(talk) as url, Transport() as http:
        with pytest.raises(TimedOut):
            await http.post(url, b"", {}, 0.05)
        assert await asyncio.wait_for(closed.get(), 5.0) == b""
        call = asyncio.ensure_future(http.post(url, b"", {}, 30.0))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.wait_for(closed.get(), 5.0) == b""


async def test_an_answer_over_the_limit_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ANSWER_BYTES", 1000)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + bytes(5000))
        await writer.drain()

    async with server(talk) as url, Transport() as http:
        with pytest.raises(Unreachable, match="more than 1000 bytes"):
            await http.post(url, b"", {}, 5.0)


async def test_closing_the_transport_ends_what_waits() -> None:
    asked = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        asked.set()
        await reader.read()

    async with server(talk) as url:
        async with Transport() as http:
            call = asyncio.ensure_future(http.post(url, b"", {}, 30.0))
            await asked.wait()
        with pytest.raises(Unreachable):
            await call


# --- answers that come in pieces ------------------------------------------------------------------------------------------

CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def begun(http: Transport, url: str) -> StreamedAnswer:
    answer = await http.stream(url, (b"ask",), {}, 5.0)
    assert isinstance(answer, StreamedAnswer)
    return answer


async def test_a_stream_is_read_as_it_comes_and_its_connection_kept() -> None:
    step = asyncio.Event()
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            await request(reader)
            writer.write(CHUNKED + chunk(b"one"))
            await step.wait()
            step.clear()
            writer.write(chunk(b"two") + b"0\r\n\r\n")

    async with server(talk) as url, Transport() as http:
        for _ in range(2):
            answer = await begun(http, url)
            assert await answer.read(5.0) == b"one"
            step.set()
            assert await answer.read(5.0) == b"two"
            assert await answer.read(5.0) == b""
            answer.close()
            answer.close()
            assert len({*map(id, *http._idle.values())}) == len(*http._idle.values()) == 1
    assert connections == 1


async def test_an_answer_that_is_no_200_is_an_ordinary_one() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.1 504 Gateway Timeout\r\ncontent-length: 4\r\n\r\nla")
        writer.write(b"te")

    async with server(talk) as url, Transport() as http:
        answer = await http.stream(url, (b"ask",), {}, 5.0)
        assert isinstance(answer, HttpAnswer)
        assert (answer.status, answer.body) == (504, b"late")


@pytest.mark.parametrize(
    ("sent", "error", "words"),
    [
        (b"", TimedOut, "no answer within"),
        (b"HTTP/1.1 200", Unreachable, "closed"),
        (b"nonsense\r\n", Unreachable, "not HTTP"),
    ],
)
async def test_a_stream_that_does_not_begin(sent: bytes, error: type[Exception], words: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        if sent:
            writer.write(sent)
        else:
            await reader.read()

    async with server(talk) as url, Transport() as http:
        with pytest.raises(error, match=words):
            await http.stream(url, (b"ask",), {}, 0.3)


async def test_a_stream_that_breaks_or_goes_silent_says_so() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = (await request(reader))[-5:]
        writer.write(CHUNKED + chunk(b"one"))
        if kind == b"break":
            await writer.drain()
        else:
            await reader.read()

    async with server(talk) as url, Transport() as http:
        for body, error in ((b"break", Unreachable), (b"quiet", TimedOut)):
            answer = await http.stream(url, (body,), {}, 5.0)
            assert isinstance(answer, StreamedAnswer)
            assert await answer.read(5.0) == b"one"
            with pytest.raises(error):
                await answer.read(0.2)
            answer.close()


async def test_closing_a_stream_early_tells_the_other_side() -> None:
    left = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(CHUNKED + chunk(b"one"))
        await reader.read()
        left.set()

    async with server(talk) as url, Transport() as http:
        answer = await begun(http, url)
        answer.close()
        async with asyncio.timeout(5):
            await left.wait()


async def test_what_nobody_reads_is_left_to_the_sender() -> None:
    sent = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request(reader)
        writer.write(CHUNKED)
        for _ in range(400):
            writer.write(chunk(b"x" * 100_000))
            await writer.drain()
            sent += 1
        writer.write(b"0\r\n\r\n")

    async with server(talk) as url, Transport() as http:
        answer = await begun(http, url)
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.1)  # nothing else tells that the sender has come to a halt
        assert sent < 200
        size = 0
        while piece := await answer.read(5.0):
            size += len(piece)
        answer.close()
        assert size == 400 * 100_000
