"""What the routes of the OpenAI API share: where a request is wrong, and errors among the events of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest

from services.dataplane.errors import BadRequest, QueueFull
from services.gateway.completions import CompletionRequest
from services.gateway.openai import parse, with_errors


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "a"}, "^model: Field required"),
        ({"model": "m", "prompt": 3}, "^prompt: Input should be a valid string"),
        ({"model": "m", "prompt": ["a", [3]]}, "^prompt.1: Input should be a valid string"),
        ({"model": "m", "prompt": "a", "stream_options": {"x": 1}}, "^stream_options.x: Extra"),
        ({"model": "m", "prompt": "a", "str": 1}, "^str: Extra"),
    ],
)
def test_an_error_names_the_place_as_the_request_has_it(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        parse(CompletionRequest, fields)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (QueueFull("no room"), "queue_full", "no room"),
        (KeyError("secret"), "internal", "internal error (KeyError); the server's log has the details"),
    ],
)
async def test_what_fails_among_the_events_is_the_last_of_them(
    error: Exception, code: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    closed = False

    async def events() -> AsyncGenerator[bytes]:
        nonlocal closed
        try:
            yield b"data: 1\n\n"
            raise error
        finally:
            closed = True

    first, last = [each async for each in with_errors(events())]
    assert first == b"data: 1\n\n"
    told = orjson.loads(last.removeprefix(b"data: "))["error"]
    assert (told["code"], told["message"]) == (code, message)
    assert closed
    assert len(caplog.records) == (code == "internal")
