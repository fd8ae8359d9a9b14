"""The short way of hot requests through uvicorn's protocol, byte by byte over real sockets, and the drain of a process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from services import server
from services.hotpath import Answer, Endpoint, Front, Request, Stream
from services.transport import Transport, Unreachable
from tests.services import harness

LIMIT = 1000


class House:
    """An app with one hot endpoint, which answers with the body reversed, or as the body tells it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        app = FastAPI()

        @app.get("/cold")
        def cold() -> str:
            return "cold"

        @app.post("/cold")
        def cold_post() -> str:
            return "cold post"

        self.front = Front(app)
        self.front.open(Endpoint(self.work, body_limit=LIMIT))

    async def work(self, request: Request) -> Answer:
        self.requests.append(request)
        if request.body == b"wait":
            self.entered.set()
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if request.body == b"fail":
            raise ZeroDivisionError("a secret")
        return Answer(200, [(b"x-model", request.parameters["model"].encode())], request.body[::-1])


@asynccontextmanager
async def served() -> AsyncIterator[tuple[House, str, int]]:
    house = House()
    async with harness.serving(house.front) as url:
        yield house, url, int(url.rsplit(":", 1)[1])


def post(body: bytes, *headers: str, path: str = "/v2/models/m/infer", length: bool = True, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", *headers]
    if length:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status == 100:
        return status, head, b""
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return status, head, await reader.readexactly(length)


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/v2/models/m/infer", {"model": "m"}),
        ("/v2/models/m/versions/1/infer", {"model": "m", "version": "1"}),
        ("/v2/models/m%2Dx/infer?trace=1", {"model": "m-x"}),
    ],
)
async def test_a_hot_path_names_model_and_version(path: str, parameters: dict[str, str]) -> None:
    async with served() as (house, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b"abc", "X-Thing: 1", path=path))
        status, head, body = await read_answer(reader)
        assert (status, body) == (200, b"cba")
        assert f"x-model: {parameters['model']}".encode() in head
        assert house.requests[0].parameters == parameters
        assert house.requests[0].headers["x-thing"] == "1"
        writer.close()


async def test_hot_and_cold_requests_share_a_connection() -> None:
    async with served() as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request, wanted in (
            (post(b"ab"), b"ba"),
            (b"GET /cold HTTP/1.1\r\nhost: x\r\n\r\n", b'"cold"'),
            (post(b"zz", path="/cold"), b'"cold post"'),
            (post(b"cd"), b"dc"),
        ):
            writer.write(request)
            assert (await read_answer(reader))[2] == wanted
        writer.close()


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with served() as (house, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        cold = b"GET /cold HTTP/1.1\r\nhost: x\r\n\r\n"
        writer.write(post(b"wait") + post(b"ab") + cold + post(b"x" * (LIMIT + 1)) + post(b"never read"))
        await house.entered.wait()
        assert len(house.requests) == 1, "the second waits for its turn"
        house.go.set()
        assert (await read_answer(reader))[2] == b"tiaw"
        assert (await read_answer(reader))[2] == b"ba"
        assert (await read_answer(reader))[2] == b'"cold"'
        status, head, _ = await read_answer(reader)
        assert status == 413
        assert b"connection: close" in head
        assert await reader.read() == b""
        writer.close()


async def test_a_body_over_the_limit_is_refused_before_it_is_sent() -> None:
    async with served() as (house, _, port):
        for announced in (f"{LIMIT + 1}", "9" * 30):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(b"", f"content-length: {announced}", length=False))
            answer = await asyncio.wait_for(reader.readline(), 5)
            assert b" 413 " in answer or b" 400 " in answer
            writer.close()
        chunk = b"%x\r\n" % LIMIT + b"y" * LIMIT + b"\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b"", "transfer-encoding: chunked", length=False) + chunk + chunk)
        assert b" 413 " in await reader.readline()
        writer.close()
        assert house.requests == []


async def test_a_body_in_pieces_chunked_or_announced_is_put_together() -> None:
    async with served() as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for byte in post(b"slowly"):
            writer.write(bytes([byte]))
            await writer.drain()
        assert (await read_answer(reader))[2] == b"ylwols"
        writer.write(post(b"", "transfer-encoding: chunked", length=False) + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
        assert (await read_answer(reader))[2] == b"cba"
        writer.write(post(b"", "Expect: 100-continue", "content-length: 2", length=False))
        assert (await read_answer(reader))[0] == 100
        writer.write(b"ok")
        assert (await read_answer(reader))[2] == b"ko"
        writer.close()


@pytest.mark.parametrize(("version", "header"), [("1.0", "x: y"), ("1.1", "connection: close")])
async def test_a_client_that_wants_no_more_gets_its_answer_and_the_end(version: str, header: str) -> None:
    async with served() as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b"bye", header, version=version))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"eyb")
        writer.close()


async def test_a_client_that_leaves_cancels_the_work() -> None:
    async with served() as (house, url, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b"wait"))
        await house.entered.wait()
        writer.close()
        await asyncio.wait_for(house.cancelled.wait(), 5)
        async with Transport() as http:
            assert (await http.post(f"{url}/v2/models/m/infer", b"on", {}, 5.0)).body == b"no"


async def test_a_fault_is_told_without_its_details() -> None:
    async with served() as (_, url, _), Transport() as http:
        answer = await http.post(f"{url}/v2/models/m/infer", b"fail", {}, 5.0)
        assert answer.status == 500
        assert b"a secret" not in answer.body
        assert (await http.post(f"{url}/v2/models/m/infer", b"on", {}, 5.0)).body == b"no"


@pytest.mark.parametrize("garbage", [b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"POST /v2/models/m/infer HTTP/1.1\r\nbad\r\n\r\n"])
async def test_what_is_not_http_is_refused_and_the_server_goes_on(garbage: bytes) -> None:
    async with served() as (_, url, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(garbage)
        assert b" 400 " in await reader.readline()
        writer.close()
        async with Transport() as http:
            assert (await http.post(f"{url}/v2/models/m/infer", b"on", {}, 5.0)).body == b"no"


DRAINING = """
import asyncio, sys
from fastapi import FastAPI
from services import server
from services.hotpath import Answer, Endpoint, Front

class Application:
    draining = False
    in_flight = 0

async def work(request):
    application.in_flight += 1
    try:
        print("working", flush=True)
        await asyncio.sleep(float(request.body))
        return Answer(200, [], b"draining" if application.draining else b"open")
    finally:
        application.in_flight -= 1

application = Application()
front = Front(FastAPI())
front.open(Endpoint(work, body_limit=100))
server.serve(front, application, server.listen("127.0.0.1", 0), grace_s=float(sys.argv[1]),
             announce=lambda url: print(url, flush=True))
"""


async def test_sigterm_drains_stragglers_are_answered_and_the_process_ends_well() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", DRAINING, "10", stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip() + "/v2/models/m/infer"
    async with Transport() as http:
        inside = asyncio.ensure_future(http.post(url, b"0.3", {}, 20.0))
        assert await process.stdout.readline() == b"working\n"
        process.send_signal(signal.SIGTERM)
        straggler = await http.post(url, b"0.01", {}, 20.0)
        assert straggler.body in (b"open", b"draining")
        assert (await inside).body == b"draining"
        assert await asyncio.wait_for(process.wait(), 20) == 0
        with pytest.raises(Unreachable):
            await http.post(url, b"0", {}, 5.0)


async def test_a_drain_has_a_limit() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", DRAINING, "0.2", stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip() + "/v2/models/m/infer"
    async with Transport() as http:
        hanging = asyncio.ensure_future(http.post(url, b"600", {}, 60.0))
        assert await process.stdout.readline() == b"working\n"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) is not None
        with pytest.raises(Unreachable):
            await hanging


@pytest.mark.parametrize("first", [b"", post(b"half a request")[:-3], post(b"whole")], ids=["silent", "half", "idle"])
async def test_a_connection_that_goes_quiet_is_cut(first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("READ_S", "KEEP_ALIVE_S", "WATCH_S"):
        monkeypatch.setattr(server, limit, 0.05)
    async with served() as (_, url, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
        writer.close()
        async with Transport() as http:
            assert (await http.post(f"{url}/v2/models/m/infer", b"on", {}, 5.0)).body == b"no"


# --- answers that come in pieces ------------------------------------------------------------------------------------------


class Stage:
    """An endpoint whose answers come in pieces that the test puts in."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.front = Front(FastAPI())
        self.front.open(Endpoint(self.work, body_limit=LIMIT))

    async def work(self, request: Request) -> Stream | Answer:
        if request.body == b"whole":
            return Answer(200, [], b"whole")
        return Stream(200, [(b"x-kind", b"stream")], self.made())

    async def made(self) -> AsyncGenerator[bytes]:
        try:
            while (piece := await self.pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed.set()


async def chunk_of(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def test_pieces_are_sent_when_they_come_and_the_connection_goes_on() -> None:
    stage = Stage()
    async with harness.serving(stage.front) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(post(b"stream") + post(b"whole"))
        stage.pieces.put_nowait(b"one")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"transfer-encoding: chunked" in head
        assert b"x-kind: stream" in head
        assert await chunk_of(reader) == b"one"
        stage.pieces.put_nowait(b"two")
        assert await chunk_of(reader) == b"two"
        stage.pieces.put_nowait(None)
        assert await chunk_of(reader) == b""
        assert (await read_answer(reader))[2] == b"whole"
        assert stage.closed.is_set()
        writer.close()


async def test_a_client_that_leaves_closes_the_pieces() -> None:
    stage = Stage()
    async with harness.serving(stage.front) as url:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(post(b"stream"))
        stage.pieces.put_nowait(b"one")
        await asyncio.sleep(0)
        writer.close()
        async with asyncio.timeout(5):
            await stage.closed.wait()


async def test_a_stream_that_fails_is_cut_and_not_ended(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    async with harness.serving(stage.front) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(post(b"stream"))
        stage.pieces.put_nowait(b"one")
        await reader.readuntil(b"\r\n\r\n")
        assert await chunk_of(reader) == b"one"
        stage.pieces.put_nowait(ZeroDivisionError("a secret"))
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await chunk_of(reader)
        writer.close()
    assert "a streamed answer failed" in caplog.text


async def test_an_old_client_gets_the_pieces_until_the_connection_closes() -> None:
    stage = Stage()
    async with harness.serving(stage.front) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(post(b"stream", version="1.0"))
        for piece in (b"one", b"two", None):
            stage.pieces.put_nowait(piece)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert body == b"onetwo"
        assert b"connection: close" in head
        writer.close()
