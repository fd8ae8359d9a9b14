"""The OpenAI API's `POST /v1/audio/transcriptions`: a sound file in a form, its text as JSON, plain, or as events.

`verbose_json`, `srt` and `vtt` need times that a transcribing pipeline does not give, and are refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson

from services.dataplane.errors import BadRequest, shown
from services.gateway import forms
from services.gateway.choices import Choices
from services.gateway.openai import DONE, EVENTS, event, parse, prompt_tokens, refuse, texts, with_errors
from services.gateway.recognition import AUDIO, transcribes
from services.gateway.sampling import Sampling
from services.gateway.service import Answered, GatewayService, Trace, server_timing
from services.hotpath import JSON, Answer, Request, Stream

_PLAIN = (b"content-type", b"text/plain; charset=utf-8")
_REFUSED = dict.fromkeys(("language", "prompt", "chunking_strategy", "include[]", "timestamp_granularities[]"), ("",))
_FIELDS = ("file", "model", "response_format", "temperature", "stream", "seed", *_REFUSED)


class Transcriptions:
    """The route, over one gateway."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def transcriptions(self, asked: Request, trace: Trace) -> Answer | Stream:
        """`POST /v1/audio/transcriptions`, by way of `GatewayService.serve`."""
        with self._service.reading():
            form = forms.read(asked.headers.get("content-type", ""), asked.body)
            fields = _fields(form)
            plan = self._service.plan(fields.get("model", ""))
            if not transcribes(plan):
                raise BadRequest(f"model: pipeline {fields['model']!r} transcribes nothing; see /v1/models")
            until = self._service.deadline(plan, asked, {})
            sampling = _sampling(fields)
            tensors = {f"request.{AUDIO}": texts(AUDIO, [form["file"]]), **sampling.tensors(plan, 1)}
        choices = Choices(1, ())
        if fields.get("stream") == "true":
            states = self._service.stream(plan, tensors, until, trace, choices.take)
            first = await anext(states)
            return Stream(200, [*EVENTS, server_timing(first)], with_errors(_events(choices, first, states)))
        answered = await self._service.run(plan, tensors, until, trace)
        choices.take(answered.tensors)
        choices.end(answered.tensors)
        text = choices.each[0].delta()
        if fields.get("response_format") == "text":
            return Answer(200, [_PLAIN, server_timing(answered)], text.encode())
        body = {"text": text, "usage": _usage(choices, answered)}
        return Answer(200, [JSON, server_timing(answered)], orjson.dumps(body))


async def _events(choices: Choices, first: Answered, states: AsyncGenerator[Answered]) -> AsyncGenerator[bytes]:
    whole: list[str] = []

    def delta() -> bytes:
        text = choices.each[0].delta()
        whole.append(text)
        return event({"type": "transcript.text.delta", "delta": text}) if text else b""

    async with aclosing(states):
        last = first
        if told := delta():
            yield told
        async for state in states:
            last = state
            if told := delta():
                yield told
        choices.end(last.tensors)
        yield delta() + event({"type": "transcript.text.done", "text": "".join(whole), "usage": _usage(choices, last)})
        yield DONE


def _fields(form: Mapping[str, bytes]) -> dict[str, str]:
    for name in form:
        if name not in _FIELDS:
            raise BadRequest(f"{shown(name)} is not supported; leave it out")
    if "file" not in form or "model" not in form:
        raise BadRequest("the form must have the fields file and model")
    fields = {name: value.decode(errors="replace") for name, value in form.items() if name != "file"}
    refuse(fields, _REFUSED)
    if fields.get("response_format", "json") not in ("json", "text"):
        raise BadRequest(f"response_format: {shown(fields['response_format'])} is not supported; json and text are")
    if fields.get("stream", "false") not in ("true", "false"):
        raise BadRequest(f"stream: {shown(fields['stream'])} is neither true nor false")
    return fields


def _sampling(fields: Mapping[str, str]) -> Sampling:
    return parse(Sampling, {name: fields[name] for name in ("temperature", "seed") if fields.get(name)}, strict=False)


def _usage(choices: Choices, answered: Answered) -> dict[str, Any]:
    used = prompt_tokens(answered.tensors)
    return {
        "type": "tokens",
        "input_tokens": used,
        "output_tokens": choices.tokens,
        "total_tokens": used + choices.tokens,
    }
