"""The OpenAI API's text: `POST /v1/completions` and `POST /v1/chat/completions`, whole or streamed as server-sent events.

A stream is sent as its tokens are made. What goes wrong before the first token is an ordinary error; after it the status is
out, and the error is an event. Stop strings are cut here: an answer that meets one ends there, and with it the work for it.
"""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from services.dataplane.deadline import Deadline
from services.dataplane.errors import BadRequest, shown
from services.dataplane.wire import Tensor
from services.gateway.choices import Choice, Choices
from services.gateway.openai import DONE, EVENTS, NO_EFFECT, document, event, parse, prompt_tokens, refuse, texts, with_errors
from services.gateway.recognition import IMAGE, MESSAGES, chats, prompt_input
from services.gateway.sampling import MAX_TOKENS, Sampling, stop_strings
from services.gateway.service import REQUEST_ID, Answered, GatewayService, Trace, server_timing
from services.gateway.table import Plan
from services.hotpath import JSON, Answer, Request, Stream

_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
}
_REFUSED_COMPLETION: Mapping[str, tuple[Any, ...]] = {
    **_REFUSED,
    "best_of": (1,),
    "logprobs": (),
    "echo": (False,),
    "suffix": ("",),
}
_REFUSED_CHAT: Mapping[str, tuple[Any, ...]] = {
    **_REFUSED,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are refused, unless they hold one of these values or null."""
_ROLES = ("system", "user", "assistant")


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _TextRequest(Sampling):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None


class CompletionRequest(_TextRequest):
    """Body of `POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1)]


class ChatRequest(_TextRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = MAX_TOKENS


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, ready to be run."""

    model: str
    id: str
    kind: Literal["text_completion", "chat.completion"]
    plan: Plan
    tensors: Mapping[str, Tensor]
    until: Deadline
    items: int
    stops: tuple[str, ...]
    usage: bool
    """Whether the last event of a stream tells it."""


class Completions:
    """The two routes, over one gateway."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def completions(self, asked: Request, trace: Trace) -> Answer | Stream:
        """`POST /v1/completions`, by way of `GatewayService.serve`."""
        with self._service.reading():
            request = parse(CompletionRequest, _supported(document(asked.body), _REFUSED_COMPLETION))
            plan = self._service.plan(request.model)
            name = prompt_input(plan)
            if name is None:
                raise BadRequest(f"model: pipeline {request.model!r} continues no prompts; see /v1/models")
            prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
            tensors = {
                f"request.{name}": texts(name, [prompt.encode() for prompt in prompts]),
                **request.tensors(plan, len(prompts)),
            }
            ready = self._ready(request, asked, trace, "text_completion", plan, tensors, len(prompts))
        return await self._answer(ready, trace, bool(request.stream))

    async def chat(self, asked: Request, trace: Trace) -> Answer | Stream:
        """`POST /v1/chat/completions`, by way of `GatewayService.serve`."""
        with self._service.reading():
            request = parse(ChatRequest, _supported(document(asked.body), _REFUSED_CHAT))
            if request.max_completion_tokens is not None:
                if request.max_tokens not in (None, request.max_completion_tokens):
                    raise BadRequest("max_tokens and max_completion_tokens say different things; send one of them")
                request.max_tokens = request.max_completion_tokens
            plan = self._service.plan(request.model)
            if not chats(plan):
                raise BadRequest(f"model: pipeline {request.model!r} does not chat; see /v1/models")
            messages, images = _conversation(request.messages)
            tensors = {f"request.{MESSAGES}": texts(MESSAGES, [orjson.dumps(messages)]), **request.tensors(plan, 1)}
            if IMAGE in plan.inputs:
                if len(images) != 1:
                    raise BadRequest(f"messages: pipeline {request.model!r} takes exactly one image, not {len(images)}")
                tensors[f"request.{IMAGE}"] = texts(IMAGE, images)
            elif images:
                raise BadRequest(f"messages: pipeline {request.model!r} takes no images")
            ready = self._ready(request, asked, trace, "chat.completion", plan, tensors, 1)
        return await self._answer(ready, trace, bool(request.stream))

    def _ready(
        self,
        request: _TextRequest,
        asked: Request,
        trace: Trace,
        kind: Literal["text_completion", "chat.completion"],
        plan: Plan,
        tensors: Mapping[str, Tensor],
        items: int,
    ) -> _Asked:
        if request.stream_options is not None and not request.stream:
            raise BadRequest("stream_options: only of a stream; set stream too, or leave it out")
        return _Asked(
            model=request.model,
            id=f"{'cmpl' if kind == 'text_completion' else 'chatcmpl'}-{trace[REQUEST_ID]}",
            kind=kind,
            plan=plan,
            tensors=tensors,
            until=self._service.deadline(plan, asked, {}),
            items=items,
            stops=stop_strings(request.stop),
            usage=request.stream_options is not None and request.stream_options.include_usage,
        )

    async def _answer(self, asked: _Asked, trace: Trace, streamed: bool) -> Answer | Stream:
        choices = Choices(asked.items, asked.stops)
        if streamed:
            states = self._service.stream(asked.plan, asked.tensors, asked.until, trace, choices.take)
            first = await anext(states)
            return Stream(200, [*EVENTS, server_timing(first)], with_errors(_events(asked, choices, first, states)))
        enough = choices.take if asked.stops else None
        answered = await self._service.run(asked.plan, asked.tensors, asked.until, trace, enough)
        choices.take(answered.tensors)
        choices.end(answered.tensors)
        body = {
            **_envelope(asked, asked.kind),
            "choices": [_whole(asked, i, choice) for i, choice in enumerate(choices.each)],
            "usage": _usage(choices, answered),
        }
        return Answer(200, [JSON, server_timing(answered)], orjson.dumps(body))


async def _events(asked: _Asked, choices: Choices, first: Answered, states: AsyncGenerator[Answered]) -> AsyncGenerator[bytes]:
    """The events of a stream, from the first state on."""
    envelope = _envelope(asked, "chat.completion.chunk" if asked.kind == "chat.completion" else asked.kind)
    if asked.usage:
        envelope["usage"] = None
    piece: Callable[[int, str | None, str | None], dict[str, Any]]
    piece = _chat_piece if asked.kind == "chat.completion" else _text_piece

    def pieces(finished: bool) -> bytes:
        told = []
        for i, choice in enumerate(choices.each):
            if text := choice.delta():
                told.append(event({**envelope, "choices": [piece(i, text, None)]}))
            if finished:
                told.append(event({**envelope, "choices": [piece(i, None, choice.finish)]}))
        return b"".join(told)

    async with aclosing(states):
        last = first
        if asked.kind == "chat.completion":
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield event({**envelope, "choices": [role]})
        if told := pieces(False):
            yield told
        async for state in states:
            last = state
            if told := pieces(False):
                yield told
        choices.end(last.tensors)
        yield pieces(True)
        if asked.usage:
            yield event({**envelope, "choices": [], "usage": _usage(choices, last)})
        yield DONE


def _envelope(asked: _Asked, kind: str) -> dict[str, Any]:
    return {"id": asked.id, "object": kind, "created": int(time.time()), "model": asked.model}


def _text_piece(index: int, text: str | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text or "", "logprobs": None, "finish_reason": finish}


def _chat_piece(index: int, text: str | None, finish: str | None) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _whole(asked: _Asked, index: int, choice: Choice) -> dict[str, Any]:
    if asked.kind == "text_completion":
        return _text_piece(index, choice.delta(), choice.finish)
    message = {"role": "assistant", "content": choice.delta(), "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish}


def _usage(choices: Choices, answered: Answered) -> dict[str, int]:
    used = prompt_tokens(answered.tensors)
    return {"prompt_tokens": used, "completion_tokens": choices.tokens, "total_tokens": used + choices.tokens}


def _supported(fields: dict[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """A request without the fields that ask for nothing we do not have; BadRequest where one does."""
    refuse(fields, refused)
    return {name: value for name, value in fields.items() if name not in refused and name not in NO_EFFECT}


# --- chat messages --------------------------------------------------------------------------------------------------------


def _conversation(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The messages as the chat stage takes them, and the images in them."""
    images: list[bytes] = []
    told = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role not in _ROLES:
            raise BadRequest(f"{where}.role: {shown(role)} is not one of {', '.join(_ROLES)}, developer")
        for name, value in message.items():
            if name not in ("role", "content", "name", "refusal", "annotations") and value:
                raise BadRequest(f"{where}.{shown(name)} is not supported; leave it out")
        told.append({"role": role, "content": _content(message.get("content"), where, images)})
    return told, images


def _content(content: Any, where: str, images: list[bytes]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadRequest(f"{where}.content must be a text or a list of parts")
    before = len(images)
    parts = [_part(part, f"{where}.content[{i}]", images) for i, part in enumerate(content)]
    return parts if len(images) > before else "\n".join(part["text"] for part in parts)


def _part(part: Any, where: str, images: list[bytes]) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        images.append(_image(url.get("url") if isinstance(url, dict) else url, where))
        return {"type": "image"}
    raise BadRequest(f"{where}: only parts of type text and image_url are supported, not {shown(kind)}")


def _image(url: Any, where: str) -> bytes:
    """The bytes of a data: URL. Others are refused: the gateway fetches nothing for anybody."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise BadRequest(
            f"{where}.image_url must be a data: URL (data:image/png;base64,...); this gateway fetches no images from elsewhere"
        )
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise BadRequest(f"{where}.image_url: the data is not base64") from None
