from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from orchestrator.socket_proxy.app import ANSWER_BYTES, CONNECTIONS, SocketProxy, configuration, engine
from orchestrator.socket_proxy.rules import BODY_BYTES
from tests.orchestrator.socket_proxy.example import POLICY, container

FULL_ID = "0123456789abcdef" * 4
EVENTS = {"filters": '{"label": ["espalier.scope=edge"], "type": ["container"]}'}
LIST = {"filters": '{"label": ["espalier.scope=edge"]}'}
INSPECTION = {"Id": FULL_ID, "Name": "/edge-1", "Config": {"Labels": {"espalier.scope": "edge"}}}


def answer(body: Any, status: str = "200 OK", *headers: str) -> bytes:
    """An engine's answer."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(text)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + text


Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""Answers one request, whichever it is."""


class FakeEngine:
    """Listens on a Unix socket, keeps what it is asked, and answers what the test says."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[str] = []
        """The lines of each request, head and body."""
        self.gone = asyncio.Event()
        """Set when a connection was closed from the other side."""
        self._reply = reply

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = [line.split(":")[1] for line in head.lower().splitlines() if line.startswith("content-length:")]
                body = await reader.readexactly(int(length[0])) if length else b""
                self.asked.append(head + body.decode())
                await self._reply(writer)
        self.gone.set()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def proxying(socket_path: Path, answer_s: float = 10.0) -> AsyncIterator[httpx.AsyncClient]:
    """The proxy under uvicorn, before whatever listens at the path; yields a client of it."""
    listener = socket.create_server(("127.0.0.1", 0))
    async with engine(str(socket_path)) as upstream:
        server = _Server(configuration(SocketProxy(POLICY, upstream, answer_s)))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def proxied(tmp_path: Path, reply: Reply, answer_s: float = 10.0) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    """The proxy before an engine that answers as the test says."""
    fake = FakeEngine(reply)
    listening = await asyncio.start_unix_server(fake.serve, tmp_path / "engine.sock")
    async with listening, proxying(tmp_path / "engine.sock", answer_s) as client:
        yield client, fake


def replies(*answers: bytes) -> Reply:
    """Answers one after the other."""
    left = iter(answers)

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(next(left))

    return reply


async def test_what_goes_on_is_written_anew(tmp_path: Path) -> None:
    async with proxied(tmp_path, replies(answer({"Id": FULL_ID}, "201 Created"))) as (client, fake):
        turned_round = dict(reversed(container().items()))
        came = await client.post(
            "/v1.41/containers/create?name=edge-1",
            content=json.dumps(turned_round, indent=3),
            headers={"x-registry-auth": "secret", "content-type": "application/x-www-form-urlencoded", "upgrade": "tcp"},
        )
    assert (came.status_code, came.json()) == (201, {"Id": FULL_ID})
    head, _, body = fake.asked[0].partition("\r\n\r\n")
    assert head.splitlines()[0] == "POST /v1.41/containers/create?name=edge-1 HTTP/1.1"
    names = {line.split(":")[0].lower() for line in head.splitlines()[1:]}
    assert names == {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"}
    assert "application/json" in head
    assert body == json.dumps(container(), separators=(",", ":"))


async def test_filters_reach_the_engine_as_they_were_understood(tmp_path: Path) -> None:
    async with proxied(tmp_path, replies(answer([]))) as (client, fake):
        assert (await client.get("/containers/json", params=LIST | {"all": "1", "limit": "-1"})).json() == []
    line = fake.asked[0].splitlines()[0]
    assert line == "GET /containers/json?filters=%7B%22label%22%3A+%5B%22espalier.scope%3Dedge%22%5D%7D&all=1 HTTP/1.1"


async def test_answers_pass_with_status_and_headers_but_not_those_of_the_hop(tmp_path: Path) -> None:
    refusal = answer({"message": "in use"}, "409 Conflict", "Api-Version: 1.41", "Keep-Alive: timeout=1", "Upgrade: h2c")
    chunked = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n"
    async with proxied(tmp_path, replies(refusal, chunked)) as (client, _):
        came = await client.get("/containers/json", params=LIST)
        assert (came.status_code, came.json(), came.headers["api-version"]) == (409, {"message": "in use"}, "1.41")
        assert not {"keep-alive", "upgrade"} & set(came.headers)
        whole = await client.get("/_ping")
        assert (whole.text, whole.headers["content-length"], whole.headers["content-type"]) == ("OK", "2", "text/plain")


async def test_an_act_goes_to_the_id_that_was_inspected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "orchestrator.socket_proxy")
    done = b"HTTP/1.1 204 No Content\r\n\r\n"
    async with proxied(tmp_path, replies(answer(INSPECTION), done)) as (client, fake):
        came = await client.post("/v1.41/containers/edge-1/kill?signal=SIGTERM")
    assert came.status_code == 204
    assert [asked.splitlines()[0] for asked in fake.asked] == [
        "GET /v1.41/containers/edge-1/json HTTP/1.1",
        f"POST /v1.41/containers/{FULL_ID}/kill?signal=SIGTERM HTTP/1.1",
    ]
    assert caplog.messages == [f"allowed POST /v1.41/containers/{FULL_ID}/kill?signal=SIGTERM: 204"]


async def test_an_inspection_is_answered_by_the_one_that_was_checked(tmp_path: Path) -> None:
    async with proxied(tmp_path, replies(answer(INSPECTION))) as (client, fake):
        assert (await client.get("/containers/edge-1/json")).json() == INSPECTION
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/containers/proxy/json"),
        ("GET", "/containers/proxy/logs?stdout=1&tail=1"),
        ("POST", "/containers/proxy/start"),
        ("POST", "/containers/proxy/kill?signal=SIGKILL"),
        ("DELETE", "/containers/proxy?force=1"),
    ],
)
async def test_of_a_foreign_container_nothing_is_told_or_done(tmp_path: Path, method: str, path: str) -> None:
    foreign = {**INSPECTION, "Config": {"Labels": {"espalier.scope": "other"}, "Env": ["SECRET=1"]}}
    async with proxied(tmp_path, replies(answer(foreign))) as (client, fake):
        came = await client.request(method, path)
    assert came.status_code == 403
    assert came.json() == {"message": "socket proxy: the container does not carry the label espalier.scope=edge"}
    assert [asked.splitlines()[0] for asked in fake.asked] == ["GET /containers/proxy/json HTTP/1.1"]


async def test_an_unknown_container_is_the_engines_404(tmp_path: Path) -> None:
    missing = answer({"message": "No such container: x"}, "404 Not Found")
    async with proxied(tmp_path, replies(missing)) as (client, fake):
        came = await client.delete("/containers/x")
    assert (came.status_code, came.json()) == (404, {"message": "No such container: x"})
    assert len(fake.asked) == 1


async def test_a_refusal_reaches_no_engine_and_is_logged_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with proxying(tmp_path / "none.sock") as client:
        came = await client.post("/containers/edge-1/exec", json={"Cmd": ["sh"]})
        assert came.status_code == 403
        assert came.json() == {"message": "socket proxy: this call is not among those that are allowed"}
        await client.get("/containers/json?x%0Ay=1")
    assert caplog.messages == [
        "refused POST /containers/edge-1/exec: this call is not among those that are allowed",
        "refused GET /containers/json: parameter x?y is not allowed",
    ]


@pytest.mark.parametrize(
    "path", ["/containers//json", "/%5fping", "/containers/..%2fjson", "/a/../_ping", "*", "http://engine/_ping"]
)
async def test_paths_are_judged_as_they_came(tmp_path: Path, path: str) -> None:
    async with proxying(tmp_path / "none.sock") as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert (await reader.readline()).split()[1] == b"403"
        writer.close()


async def test_an_engine_that_is_gone_is_a_502(tmp_path: Path) -> None:
    async with proxying(tmp_path / "none.sock") as client:
        for came in (await client.get("/_ping"), await client.get("/events", params=EVENTS)):
            assert came.status_code == 502
            assert came.json()["message"].startswith("socket proxy: the engine cannot be reached")


async def test_an_engine_that_is_silent_is_a_504(tmp_path: Path) -> None:
    async with proxied(tmp_path, replies(b"", b""), answer_s=0.05) as (client, _):
        for came in (await client.get("/_ping"), await client.get("/events", params=EVENTS)):
            assert (came.status_code, came.json()) == (
                504,
                {"message": "socket proxy: the engine did not answer within 0.05 s"},
            )


async def test_an_engine_that_breaks_off_is_a_502(tmp_path: Path) -> None:
    async def breaks_off(writer: asyncio.StreamWriter) -> None:
        writer.write(answer([])[:-1])
        writer.close()

    async with proxied(tmp_path, breaks_off) as (client, _):
        came = await client.get("/containers/json", params=LIST)
    assert came.status_code == 502
    assert came.json()["message"].startswith("socket proxy: the engine broke off")


async def test_an_answer_is_bounded(tmp_path: Path) -> None:
    async with proxied(tmp_path, replies(answer(b" " * (ANSWER_BYTES + 1)))) as (client, _):
        came = await client.get("/containers/json", params=LIST)
    assert (came.status_code, came.json()["message"]) == (
        502,
        f"socket proxy: the engine's answer has more than {ANSWER_BYTES} bytes",
    )


async def test_a_body_is_bounded(tmp_path: Path) -> None:
    async with proxying(tmp_path / "none.sock") as client:
        came = await client.post("/containers/create?name=edge-1", content=b" " * (BODY_BYTES + 1))
        assert (came.status_code, came.json()["message"]) == (403, f"socket proxy: the body has more than {BODY_BYTES} bytes")


async def test_a_body_must_come_in_time(tmp_path: Path) -> None:
    async with proxying(tmp_path / "none.sock", answer_s=0.05) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(b"POST /containers/create?name=edge-1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert (await reader.readline()).split()[1] == b"408"
        writer.close()


async def test_connections_are_bounded(tmp_path: Path) -> None:
    ping = b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n"
    async with proxying(tmp_path / "none.sock") as client:
        statuses, writers = [], []
        for _ in range(CONNECTIONS + 1):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
            writer.write(ping)
            statuses.append((await reader.readline()).split()[1])
            writers.append(writer)
        for writer in writers:
            writer.close()
    assert statuses == [b"502"] * CONNECTIONS + [b"503"]


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def test_events_pass_as_they_come(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM)
        await go.wait()
        writer.write(chunk(b'{"status":"start"}\n'))

    async with proxied(tmp_path, reply) as (client, fake):
        async with client.stream("GET", "/events", params=EVENTS) as events:
            # The head is here before there is any event.
            assert events.status_code == 200
            go.set()
            assert await anext(events.aiter_bytes()) == b'{"status":"start"}\n'
            assert not fake.gone.is_set()
        async with asyncio.timeout(5):
            await fake.gone.wait()


async def test_a_client_that_goes_away_ends_the_stream_at_the_engine(tmp_path: Path) -> None:
    async with proxied(tmp_path, replies(STREAM)) as (client, fake):
        async with client.stream("GET", "/events", params=EVENTS):
            assert not fake.gone.is_set()
        async with asyncio.timeout(5):
            await fake.gone.wait()


async def test_a_stream_that_the_engine_breaks_off_ends(tmp_path: Path) -> None:
    async def reply(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM + chunk(b"{}\n"))
        writer.close()

    async with proxied(tmp_path, reply) as (client, _), client.stream("GET", "/events", params=EVENTS) as events:
        assert await events.aread() == b"{}\n"
