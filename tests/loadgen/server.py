"""A small real Open Inference Protocol server whose models each behave, or misbehave, in one way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from services.dataplane.wire import HEADER_LENGTH, Limits, Message, Tensor, decode_request, encode_response, media_type

HOP = {
    "step": "encode", "service": "encode-a", "replica": "encode-a-0", "node": "n0",
    "queue_s": 0.001, "compute_s": 0.004, "transfer_s": 0.0005, "batch": 2,
}  # fmt: skip


@dataclass
class Server:
    """What the tests see of the server, and the strings they pull."""

    url: str = ""
    release: asyncio.Event = field(default_factory=asyncio.Event)
    """Lets the model `held` answer."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when `held` has got its first task."""
    requests: list[tuple[str, Mapping[str, str], Message]] = field(default_factory=list)
    binary: bool = True

    def answer(self, message: Message, *, identifier: str | None = None) -> web.Response:
        output = Tensor("embedding", "FP32", np.zeros((1, 4), np.float32))
        parameters = {"hops": [HOP]} if message.parameters.get("hops") is True else {}
        body, length = encode_response(
            Message((output,), id=identifier or message.id, parameters=parameters, binary=message.binary), model="m"
        )
        kind, extra = media_type(length)
        return web.Response(body=body, content_type=kind, headers=extra)


Behaviour = Callable[[Server, web.Request, Message], Awaitable[web.StreamResponse]]


async def _prompt(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
    return server.answer(message)


async def _late(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
    # The whole budget counted from the arrival here: whatever the machine's speed, the answer comes after the deadline.
    await asyncio.sleep(float(request.headers["X-Request-Timeout-Seconds"]))
    return server.answer(message)


async def _held(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
    server.arrived.set()
    await server.release.wait()
    return server.answer(message)


async def _swapped(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
    return server.answer(message, identifier="someone-else")


async def _broken(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def _truncated(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"{")
    assert request.transport is not None
    request.transport.close()
    return response


def _refusal(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Behaviour:
    async def refuse(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
        return web.json_response(body, status=status, headers=headers)

    return refuse


def _body(body: bytes) -> Behaviour:
    async def answer(server: Server, request: web.Request, message: Message) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    return answer


BEHAVIOURS: Mapping[str, Behaviour] = {
    "embed": _prompt,
    "classify": _prompt,
    "late": _late,
    "held": _held,
    "swapped": _swapped,
    "broken": _broken,
    "truncated": _truncated,
    "expired": _refusal(504, {"error": "too late", "reason": "expired_in_queue", "hops": [HOP]}),
    "full": _refusal(429, {"error": "full", "reason": "queue_full"}, {"Retry-After": "3"}),
    "closed": _refusal(503, {"error": "none ready", "reason": "no_replica"}),
    "wrong": _refusal(400, {"error": "no such tensor"}),
    "garbage": _body(b"<html>it works!</html>"),
    "empty": _body(b'{"outputs": []}'),
}

_TEXT = {"name": "text", "datatype": "BYTES", "shape": [-1]}
_METADATA: Mapping[str, Mapping[str, Any]] = {
    "embed": {"inputs": [_TEXT], "parameters": {"deadline_s": 30.0, "epsilon": 0.05}},
    "classify": {"inputs": [_TEXT, {"name": "labels", "datatype": "BYTES", "shape": [-1]}], "parameters": {"deadline_s": 30.0}},
}


@asynccontextmanager
async def serve(*, binary: bool = True) -> AsyncIterator[Server]:
    """The server on a port of its own, in the event loop of the test."""
    server = Server(binary=binary)

    async def root(request: web.Request) -> web.Response:
        return web.json_response({"name": "test", "extensions": ["binary_tensor_data"] if binary else []})

    async def metadata(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name == "inputless":
            return web.json_response({"name": name})
        if name not in BEHAVIOURS:
            return web.json_response({"error": f"no model {name!r}"}, status=404)
        return web.json_response({"name": name, **_METADATA.get(name, {"inputs": [_TEXT]})})

    async def infer(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        message = decode_request(await request.read(), request.headers.get(HEADER_LENGTH), Limits())
        server.requests.append((name, dict(request.headers), message))
        return await BEHAVIOURS[name](server, request, message)

    app = web.Application()
    app.add_routes(
        [
            web.get("/v2", root),
            web.get("/v2/models/{name}", metadata),
            web.post("/v2/models/{name}/infer", infer),
        ]
    )
    # A test that leaves a task held must not wait for it at the end.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        server.release.set()
        await runner.cleanup()


def lines(text: bytes) -> list[dict[str, Any]]:
    """JSON lines as objects."""
    return [orjson.loads(line) for line in text.splitlines()]
