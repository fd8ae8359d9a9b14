from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import numpy as np
import orjson
import pytest
import pytest_asyncio

from loadgen.client import Answer, Client, NoAnswer, Reading, Request, _translated, read
from loadgen.corpus import InputSpec
from loadgen.errors import SetupFailed, SpecError
from services.dataplane.wire import Tensor
from tests.loadgen.server import HOP, Server, serve

TEXT = (Tensor("text", "BYTES", np.array([b"a small text"], dtype=object)),)


@pytest_asyncio.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with Client(server.url, connections=4, headers={"Authorization": "Bearer k"}) as client:
        yield client


def request(client: Client, model: str, *, binary: bool = True, deadline_s: float = 0.25) -> Request:
    return client.encode(model, "t-1", TEXT, deadline_s, binary=binary)


async def test_a_task_goes_out_binary_with_its_id_and_its_deadline(server: Server, client: Client) -> None:
    assert await client.takes_binary()
    await client.send(request(client, "embed"), 10)
    ((model, headers, message),) = server.requests
    assert model == "embed"
    assert headers["X-Request-Timeout-Seconds"] == "0.25"
    assert headers["Authorization"] == "Bearer k"
    assert "Inference-Header-Content-Length" in {name.title() for name in headers}
    assert message.id == "t-1"
    assert message.binary is True
    assert message.tensors[0].array.tolist() == [b"a small text"]


async def test_a_server_without_the_extension_gets_json(client: Client, server: Server) -> None:
    async with serve(binary=False) as plain, Client(plain.url, connections=1) as to_plain:
        assert not await to_plain.takes_binary()
        answer = await to_plain.send(request(to_plain, "embed", binary=False), 10)
        assert orjson.loads(answer.body)["outputs"][0]["data"] == [0, 0, 0, 0]
        assert read(answer, "t-1").problem is None


async def test_metadata_tells_inputs_deadline_and_epsilon(client: Client) -> None:
    embed = await client.metadata("embed")
    assert embed.inputs == (InputSpec("text", "BYTES", (-1,)),)
    assert (embed.deadline_s, embed.epsilon) == (30.0, 0.05)
    late = await client.metadata("late")
    assert (late.deadline_s, late.epsilon) == (None, None)


@pytest.mark.parametrize(
    ("name", "says"), [("nobody", "no metadata for 'nobody': HTTP 404, no model 'nobody'"), ("inputless", "lists no inputs")]
)
async def test_an_unusable_pipeline_is_named(client: Client, name: str, says: str) -> None:
    with pytest.raises(SetupFailed, match=says):
        await client.metadata(name)


async def test_a_server_that_is_not_there_fails_the_set_up(server: Server) -> None:
    async with serve() as gone:
        url = gone.url
    async with Client(url, connections=1) as client:
        with pytest.raises(SetupFailed, match="is the server up"):
            await client.takes_binary()


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host", "http://", "http://[::1"])
def test_an_address_that_is_none_says_how_to_write_it(url: str) -> None:
    with pytest.raises(SpecError, match="is no address"):
        Client(url, connections=1)


# --- reading answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "status", "problem", "reason", "retry_after_s", "hops"),
    [
        ("embed", 200, None, None, None, 1),
        ("garbage", 200, "bad_answer", "bad_answer", None, 0),
        ("empty", 200, "bad_answer", "bad_answer", None, 0),
        ("swapped", 200, "bad_answer", "bad_answer", None, 0),
        ("expired", 504, None, "expired_in_queue", None, 1),
        ("full", 429, None, "queue_full", 3.0, 0),
        ("closed", 503, None, "no_replica", None, 0),
        ("wrong", 400, None, "http_400", None, 0),
    ],
)
async def test_an_answer_is_read_for_what_it_says(
    client: Client, model: str, status: int, problem: str | None, reason: str | None, retry_after_s: float | None, hops: int
) -> None:
    answer = await client.send(request(client, model), 10)
    reading = read(answer, "t-1")
    assert answer.status == status
    assert (reading.problem, reading.reason, reading.retry_after_s, len(reading.hops)) == (problem, reason, retry_after_s, hops)


async def test_hops_arrive_as_they_were_sent(client: Client) -> None:
    (hop,) = read(await client.send(request(client, "embed"), 10), "t-1").hops
    assert (hop.service, hop.compute_s, hop.batch) == (HOP["service"], HOP["compute_s"], HOP["batch"])


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'{"reason": 7, "error": []}'])
def test_an_error_without_our_shape_is_told_by_its_status(body: bytes) -> None:
    assert read(Answer(500, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, body), "t-1") == Reading(reason="http_500")


# --- when no answer comes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "patience_s", "reason"),
    [("held", 0.05, "no_answer"), ("broken", 10, "disconnected"), ("truncated", 10, "broken_answer")],
)
async def test_a_missing_answer_has_a_reason(client: Client, model: str, patience_s: float, reason: str) -> None:
    with pytest.raises(NoAnswer) as error:
        await client.send(request(client, model), patience_s)
    assert error.value.reason == reason


async def test_a_refused_connection_has_a_reason() -> None:
    async with serve() as gone:
        url = gone.url
    async with Client(url, connections=1) as client:
        with pytest.raises(NoAnswer) as error:
            await client.send(request(client, "embed"), 10)
    assert error.value.reason == "connect_failed"


async def test_an_answer_that_is_no_http_is_broken() -> None:
    async def chatter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"hello?\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(chatter, "127.0.0.1", 0)
    async with listener, Client(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", connections=1) as client:
        with pytest.raises(NoAnswer) as error:
            await client.send(request(client, "embed"), 10)
    assert error.value.reason == "broken_answer"


def test_every_error_of_the_library_is_translated() -> None:
    """Fails when aiohttp grows a client error that is not one of its own kind, or whose reason is none of ours."""
    errors = [
        value for name in aiohttp.__all__ if isinstance(value := getattr(aiohttp, name), type) and issubclass(value, Exception)
    ]
    ours = {kind for kind in errors if kind.__module__ == "aiohttp.client_exceptions"}
    assert len(ours) > 15
    for kind in ours - {aiohttp.WSMessageTypeError}:  # web sockets, which are not used here
        with pytest.raises(NoAnswer) as caught, _translated():
            raise _blank(kind)
        assert caught.value.reason in NoAnswer.REASONS


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (aiohttp.ServerTimeoutError, "no_answer"),
        (aiohttp.ClientConnectorDNSError, "connect_failed"),
        (aiohttp.ClientConnectorCertificateError, "connect_failed"),
        (aiohttp.ServerDisconnectedError, "disconnected"),
        (aiohttp.ClientConnectionResetError, "disconnected"),
        (ConnectionResetError, "disconnected"),
        (aiohttp.ClientPayloadError, "broken_answer"),
        (aiohttp.ContentTypeError, "broken_answer"),
    ],
)
def test_an_error_of_the_network_is_told_from_one_of_the_answer(kind: type[Exception], reason: str) -> None:
    with pytest.raises(NoAnswer) as caught, _translated():
        raise _blank(kind)
    assert caught.value.reason == reason


def _blank(kind: type[Exception]) -> Exception:
    """An instance without its constructor, whose arguments differ from kind to kind, that can still be printed."""

    class Blank(kind):  # type: ignore[misc, valid-type]  # the kinds are found at run time
        def __init__(self) -> None:
            pass

        def __str__(self) -> str:
            return "blank"

    return Blank()
