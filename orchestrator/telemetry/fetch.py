"""The telemetry's one way to read over HTTP: a limit on the time and on the size of every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx

ANSWER_S = 0.4
"""Longest wait for one answer [s]."""
ANSWER_BYTES = 8 << 20
"""Largest answer [bytes]; a thousand replicas stay below it."""


class NoAnswer(Exception):
    """Nothing usable came in time."""


def client() -> httpx.AsyncClient:
    """A client for `get`. No limit on connections: one source that hangs must not make another one's question wait."""
    return httpx.AsyncClient(timeout=ANSWER_S, trust_env=False, limits=httpx.Limits(max_connections=None))


async def get(with_client: httpx.AsyncClient, url: str, parameters: Mapping[str, str] | None = None) -> bytes:
    """The body of a successful answer.

    Raises:
        NoAnswer: it did not come in time, is no success or is too large.
    """
    try:
        async with asyncio.timeout(ANSWER_S), with_client.stream("GET", url, params=parameters) as answer:
            answer.raise_for_status()
            body = bytearray()
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > ANSWER_BYTES:
                    raise NoAnswer(f"more than {ANSWER_BYTES} bytes")
            return bytes(body)
    except (TimeoutError, httpx.TimeoutException):
        raise NoAnswer(f"no answer within {ANSWER_S} s") from None
    except httpx.HTTPStatusError as error:
        raise NoAnswer(f"status {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoAnswer(str(error) or type(error).__name__) from None
