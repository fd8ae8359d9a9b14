"""The one door to HTTP: asks a server what a pipeline takes, encodes tasks ahead of a run, sends them, reads their answers.

Sending is kept apart from reading, so that the run can note the finish time between the two. aiohttp's errors are translated
here, in one place, into a NoAnswer with a reason; nothing above this module knows which library spoke.

    encode (before the run) --> Request --send--> Answer --read--> Reading
                                            NoAnswer
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson
from yarl import URL

from loadgen.corpus import InputSpec, describe
from loadgen.errors import SetupFailed, SpecError
from loadgen.outcome import Hop, hops_of
from services.dataplane.errors import TaskError
from services.dataplane.wire import HEADER_LENGTH, Limits, Message, Tensor, decode_response, encode_request, media_type

TIMEOUT_HEADER = "X-Request-Timeout-Seconds"
BINARY_EXTENSION = "binary_tensor_data"
HOPS_WANTED = "hops"
"""Request parameter that makes our gateway list each hop's times in the answer; other servers pass over it."""

KEEP_ALIVE_S = 4.0
"""Idle connections are dropped after this. Shorter than uvicorn's 5 s and most servers' more: a request sent just as the server
closes its end would fail by nobody's fault."""

SETUP_TIMEOUT_S = 10.0

_LIMITS = Limits(body_bytes=256 << 20, elements=64 << 20)
"""An answer that is larger than a server would take as a request is still an answer."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a server says of a model or pipeline."""

    name: str
    inputs: tuple[InputSpec, ...]
    deadline_s: float | None
    """From `parameters.deadline_s`, where the server tells one."""
    epsilon: float | None
    """Promised violation probability, from `parameters.epsilon` likewise."""


@dataclass(frozen=True, slots=True)
class Request:
    """A task as it goes out: nothing is left to compute."""

    id: str
    url: URL
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, unread."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says."""

    problem: str | None = None
    """Why a 200 is no answer; None otherwise."""
    reason: str | None = None
    detail: str | None = None
    hops: tuple[Hop, ...] = ()
    retry_after_s: float | None = None


class NoAnswer(Exception):
    """No complete HTTP answer came. `reason` is one of REASONS, the message is the network's own."""

    REASONS = ("no_answer", "connect_failed", "disconnected", "broken_answer")

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Client:
    """Connections to one server, at most `connections` at once; an async context manager."""

    def __init__(self, url: str, *, connections: int, headers: Mapping[str, str] | None = None) -> None:
        self._base = _base(url)
        self._headers = dict(headers or {})
        self._connections = connections

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            skip_auto_headers=("Accept", "Accept-Encoding"),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def takes_binary(self) -> bool:
        """Whether the server offers the binary tensor extension; a server without `GET /v2` does not.

        Raises:
            SetupFailed: nobody answers at that address.
        """
        status, document = await self._get(self._base / "v2")
        extensions = document.get("extensions")
        return status == 200 and isinstance(extensions, list) and BINARY_EXTENSION in extensions

    async def metadata(self, name: str) -> Metadata:
        """What a pipeline takes, from `GET /v2/models/NAME`.

        Raises:
            SetupFailed: nobody answers, the server does not know the name, or its metadata cannot be used.
        """
        status, document = await self._get(self._base / "v2" / "models" / name)
        if status != 200:
            said = document.get("error", "no more is said")
            raise SetupFailed(
                f"{self._base}: no metadata for {name!r}: HTTP {status}, {said}; check the name, and that it is up"
            )
        try:
            inputs = describe(document)
        except SpecError as error:
            raise SetupFailed(f"{self._base}: {name!r}: {error}") from None
        parameters = document.get("parameters")
        told: Mapping[str, Any] = parameters if isinstance(parameters, dict) else {}
        return Metadata(name, inputs, _positive(told.get("deadline_s")), _positive(told.get("epsilon")))

    def encode(self, name: str, identifier: str, tensors: tuple[Tensor, ...], deadline_s: float, *, binary: bool) -> Request:
        """One task as a request, with its deadline [s] in the X-Request-Timeout-Seconds header; it asks for the hops' times.

        Raises:
            SpecError: a tensor that has no form in JSON, an image say, for a server that takes nothing else.
        """
        message = Message(tensors, id=identifier, parameters={HOPS_WANTED: True})
        try:
            body, header_length = encode_request(message, binary=binary)
        except TaskError as error:
            raise SpecError(f"{error}, which this server does not take") from None
        kind, extra = media_type(header_length)
        headers = {"Content-Type": kind, TIMEOUT_HEADER: f"{deadline_s:.6g}", **extra}
        return Request(identifier, self._base / "v2" / "models" / name / "infer", headers, body)

    async def send(self, request: Request, patience_s: float) -> Answer:
        """Send a request and wait for the last byte of its answer.

        Args:
            request: from `encode`.
            patience_s: how long to wait in all [s], connecting included.

        Raises:
            NoAnswer: there will be none.
        """
        timeout = aiohttp.ClientTimeout(total=patience_s, ceil_threshold=math.inf)
        with _translated():
            async with self._session.post(
                request.url, data=request.body, headers=request.headers, timeout=timeout, allow_redirects=False
            ) as response:
                return Answer(response.status, response.headers, await response.read())

    async def _get(self, url: URL) -> tuple[int, dict[str, Any]]:
        """Status and JSON object at an address; {} where the body is none."""
        try:
            with _translated():
                async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=SETUP_TIMEOUT_S)) as response:
                    status, body = response.status, await response.read()
        except NoAnswer as error:
            raise SetupFailed(f"{url}: {error}; is the server up, and the address right?") from None
        return status, _document(body)


def read(answer: Answer, identifier: str) -> Reading:
    """What an answer to the task `identifier` says.

    A 200 is an answer when its body is a valid infer response with a tensor in it and, where it names a task, names this one.
    """
    if answer.status != 200:
        document = _document(answer.body)
        reason = document.get("reason")
        error = document.get("error")
        return Reading(
            reason=reason if isinstance(reason, str) and reason else f"http_{answer.status}",
            detail=error if isinstance(error, str) else None,
            hops=hops_of(document.get("hops")),
            retry_after_s=_positive(answer.headers.get("Retry-After")),
        )
    try:
        message = decode_response(answer.body, answer.headers.get(HEADER_LENGTH), _LIMITS)
    except TaskError as error:
        return _bad(str(error))
    if not message.tensors:
        return _bad("an answer without a tensor")
    if message.id is not None and message.id != identifier:
        return _bad(f"the answer to task {message.id!r}")
    return Reading(hops=hops_of(message.parameters.get("hops")))


def _bad(detail: str) -> Reading:
    return Reading(problem="bad_answer", reason="bad_answer", detail=detail)


@contextmanager
def _translated() -> Iterator[None]:
    """Aiohttp's errors as NoAnswer."""
    try:
        yield
    except TimeoutError as error:
        raise NoAnswer("no_answer", str(error) or "no answer in time") from error
    except aiohttp.ClientConnectorError as error:
        raise NoAnswer("connect_failed", str(error)) from error
    except (aiohttp.ClientConnectionError, OSError) as error:
        raise NoAnswer("disconnected", str(error)) from error
    except aiohttp.ClientError as error:
        # What is left speaks of the answer: no HTTP, a body shorter than announced, an unknown encoding.
        raise NoAnswer("broken_answer", str(error) or type(error).__name__) from error


def _base(url: str) -> URL:
    try:
        base = URL(url)
    except ValueError as error:
        raise SpecError(f"{url!r} is no address: {error}") from None
    if base.scheme not in {"http", "https"} or not base.host:
        raise SpecError(f"{url!r} is no address; write it with its scheme, e.g. http://127.0.0.1:8080")
    return base


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


def _positive(value: object) -> float | None:
    """A number above 0 from metadata or a header; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None
