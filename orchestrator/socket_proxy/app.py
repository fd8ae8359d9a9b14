"""The proxy as an ASGI application: asks `rules` about every request and speaks to the engine over its Unix socket.

A request that comes in is answered by new ones that `rules` has written; no header of it goes on. Ordinary answers are read
whole, within limits, before the first byte goes back; events pass as they come, until one of the two sides is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.socket_proxy import rules
from orchestrator.socket_proxy.rules import Call, Policy, Refusal

CONNECTIONS = 64
"""A request on one connection more gets 503."""
CONNECT_S = 2.0
ANSWER_S = 15.0
KEEP_ALIVE_S = 75
"""Longest a client's connection may be idle [s]. The engine itself has no such limit, and clients keep connections."""
ANSWER_BYTES = 4 << 20
"""Most bytes of an answer that is read whole."""
HOP_BY_HOP = frozenset({"connection", "keep-alive", "proxy-authenticate", "te", "trailer", "transfer-encoding", "upgrade"})

_LOGGER = logging.getLogger(__name__)


class TurnedBack(Exception):
    """The request gets an answer of the proxy's own.

    Attributes:
        status: 403 where it is not allowed; otherwise what went wrong between it and the engine.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def engine(socket_path: str) -> httpx.AsyncClient:
    """A client of the engine that listens on a Unix socket."""
    return httpx.AsyncClient(
        base_url="http://engine",
        transport=httpx.AsyncHTTPTransport(uds=socket_path, limits=httpx.Limits(max_connections=CONNECTIONS)),
        # Answers are timed as a whole, by the application.
        timeout=httpx.Timeout(None, connect=CONNECT_S, pool=CONNECT_S),
        headers={"accept-encoding": "identity"},
        trust_env=False,
    )


def configuration(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves the proxy. The parser is h11 because it bounds the headers."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        # uvicorn refuses from the connection on that reaches the limit.
        limit_concurrency=CONNECTIONS + 1,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


class SocketProxy:
    """The application.

    Args:
        policy: what is allowed.
        client: the way to the engine.
        answer_s: longest time for a request's body to come in, for an answer of the engine, and for a stream to begin [s].
    """

    def __init__(self, policy: Policy, client: httpx.AsyncClient, answer_s: float = ANSWER_S) -> None:
        self._policy = policy
        self._engine = client
        self._answer_s = answer_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        async with AsyncExitStack() as until_answered:
            response: Response
            try:
                response = await self._respond(request, until_answered)
            except ClientDisconnect:
                return
            except TurnedBack as turned:
                verb = "refused" if turned.status == 403 else "failed"
                _LOGGER.warning("%s %s %s: %s", verb, request.method, _path(request)[:200], turned)
                response = JSONResponse({"message": f"socket proxy: {turned}"}, turned.status)
            await response(scope, receive, send)

    async def _respond(self, request: Request, until_answered: AsyncExitStack) -> Response:
        """The engine's answer, to a request that is allowed and about nobody else's container.

        Raises:
            TurnedBack: it is not, or the engine has none.
            ClientDisconnect: the client went before its request was complete.
        """
        try:
            async with asyncio.timeout(self._answer_s):
                body = await _body(request)
        except TimeoutError:
            raise TurnedBack(408, f"the body was not complete within {self._answer_s:g} s") from None
        query = request.scope["query_string"].decode("latin-1")
        call = _allowed(rules.judge(self._policy, request.method, _path(request), query, body))
        if call.inspection is not None:
            inspected = await self._exchange(Call("GET", call.inspection))
            if inspected.status_code != 200:
                return inspected
            ours = _allowed(rules.within(self._policy, call, bytes(inspected.body)))
            if call.path == call.inspection:
                return inspected
            call = ours
        if call.streams:
            return await self._stream(call, until_answered)
        response = await self._exchange(call)
        if call.method != "GET":
            _LOGGER.info("allowed %s %s?%s: %d", call.method, call.path, call.query, response.status_code)
        return response

    async def _exchange(self, call: Call) -> Response:
        """One call, its answer read whole."""
        async with self._in_time(), AsyncExitStack() as until_read:
            answer = await self._send(call, until_read)
            body = await _whole(answer)
        return Response(body, answer.status_code, _headers(answer))

    async def _stream(self, call: Call, until_answered: AsyncExitStack) -> Response:
        """One call, its answer still to be read; the connection to the engine is closed once nobody reads any more."""
        async with self._in_time():
            answer = await self._send(call, until_answered)
        return StreamingResponse(_pieces(answer), answer.status_code, _headers(answer))

    async def _send(self, call: Call, stack: AsyncExitStack) -> httpx.Response:
        """The head of the engine's answer; the stack will close it."""
        target = f"{call.path}?{call.query}" if call.query else call.path
        headers = {"content-type": "application/json"} if call.body is not None else {}
        return await stack.enter_async_context(self._engine.stream(call.method, target, content=call.body, headers=headers))

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Bounds the time of what is within, and says what the client is told when the engine does not answer."""
        try:
            async with asyncio.timeout(self._answer_s):
                yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise TurnedBack(502, f"the engine cannot be reached ({error})") from None
        except (httpx.TimeoutException, TimeoutError):
            raise TurnedBack(504, f"the engine did not answer within {self._answer_s:g} s") from None
        except httpx.TransportError as error:
            raise TurnedBack(502, f"the engine broke off ({error})") from None


def _path(request: Request) -> str:
    """As it came, not decoded."""
    raw: bytes = request.scope["raw_path"]
    return raw.decode("latin-1")


async def _body(request: Request) -> bytes:
    """The whole of a request's body."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > rules.BODY_BYTES:
            raise TurnedBack(403, f"the body has more than {rules.BODY_BYTES} bytes")
    return bytes(body)


async def _whole(answer: httpx.Response) -> bytes:
    """The whole of an answer's body."""
    body = bytearray()
    async for piece in answer.aiter_raw():
        body += piece
        if len(body) > ANSWER_BYTES:
            raise TurnedBack(502, f"the engine's answer has more than {ANSWER_BYTES} bytes")
    return bytes(body)


def _allowed(verdict: Call | Refusal) -> Call:
    if isinstance(verdict, Refusal):
        raise TurnedBack(403, verdict.reason)
    return verdict


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """A stream as it comes. Where the engine breaks it off it ends for the client too, who will ask again."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    except httpx.TransportError as error:
        _LOGGER.warning("the engine broke off a stream: %s", error)


def _headers(answer: httpx.Response) -> Mapping[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
