"""The OpenAI API over pipelines: models and embeddings, and what all its routes share.

Which pipeline serves what is told by its inputs and outputs (`recognition`). Source: the published OpenAPI document of the
OpenAI API (2.3.0). What a request asks for and cannot have is refused with 400, never ignored.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, TypeVar

import numpy as np
import orjson
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.dataplane.errors import BadRequest, InternalFailure, NotFound, TaskError, shown
from services.dataplane.wire import Array, Tensor
from services.gateway.recognition import EMBEDDING, TOKEN_COUNT, embedded_input, routes
from services.gateway.service import GatewayService, Trace, server_timing
from services.gateway.table import Plan
from services.hotpath import JSON, Answer, Request

log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

EVENTS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
DONE = b"data: [DONE]\n\n"
NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change nothing in the answer, and so may be ignored."""


class EmbeddingsRequest(BaseModel):
    """Body of `POST /v1/embeddings`. Token arrays as input and a change of `dimensions` are refused, not ignored."""

    model_config = ConfigDict(extra="ignore")

    model: str
    input: str | list[str] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


def error_shape(error: TaskError) -> dict[str, Any]:
    """OpenAI's error object, with our machine-readable fields beside it."""
    kind = "invalid_request_error" if error.status < 500 and error.status != 429 else "server_error"
    body = error.body()
    return {**body, "error": {"message": str(error), "type": kind, "param": None, "code": error.reason}}


class OpenAI:
    """The routes for models and embeddings, over one gateway."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`: the pipelines these routes can serve, and by which of them."""
        return {"object": "list", "data": [_model(plan) for plan in self._service.table.plans.values() if routes(plan)]}

    async def model(self, model: str) -> JSONResponse:
        """`GET /v1/models/MODEL`."""
        plan = self._service.table.plans.get(model)
        if plan is None or not routes(plan):
            error = NotFound(f"no model {model!r} here; see /v1/models")
            return JSONResponse(error_shape(error), error.status)
        return JSONResponse(_model(plan))

    async def embeddings(self, asked: Request, trace: Trace) -> Answer:
        """`POST /v1/embeddings`, by way of `GatewayService.serve`."""
        with self._service.reading():
            request = parse(EmbeddingsRequest, document(asked.body))
            plan = self._service.plan(request.model)
            name = embedded_input(plan)
            if name is None:
                raise BadRequest(f"pipeline {request.model!r} makes no embeddings of texts; see /v1/models")
            length = plan.outputs[EMBEDDING].shape[-1]
            if request.dimensions is not None and request.dimensions != length:
                raise BadRequest(f"dimensions: model {request.model!r} has {length} and cannot be cut")
            until = self._service.deadline(plan, asked, {})
        inputs = [request.input] if isinstance(request.input, str) else request.input
        tensors = {f"request.{name}": texts(name, [text.encode() for text in inputs])}
        answered = await self._service.run(plan, tensors, until, trace)
        used = prompt_tokens(answered.tensors)
        body = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _vector(row, request.encoding_format)}
                for i, row in enumerate(answered.tensors[EMBEDDING].array)
            ],
            "model": request.model,
            "usage": {"prompt_tokens": used, "total_tokens": used},
        }
        encoded = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        return Answer(200, [JSON, server_timing(answered)], encoded)


# --- shared by the routes -------------------------------------------------------------------------------------------------


def document(body: bytes) -> dict[str, Any]:
    """A request's JSON body; raises BadRequest where it is none."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the request is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRequest("the request must be a JSON object")
    return found


def parse(kind: type[M], fields: Mapping[str, Any], *, strict: bool | None = None) -> M:
    """A request, out of its fields; not `strict` reads numbers out of texts too, and None leaves that to the kind.

    Raises:
        BadRequest: a field is missing, wrong or unknown; the message names it.
    """
    try:
        return kind.model_validate(fields, strict=strict)
    except ValidationError as error:
        # Of a field that takes this or that there is one for each: the one that got furthest in says most.
        worst = max(error.errors(), key=lambda each: len(each["loc"]))
        raise BadRequest(f"{_place(fields, worst['loc'])}: {worst['msg']}") from None


def _place(fields: Mapping[str, Any], loc: Sequence[int | str]) -> str:
    """What of a request an error is about. Where a field takes this or that, `loc` also names the type that was tried."""
    there: Any = fields
    names = []
    for part in loc:
        if isinstance(there, dict) or (isinstance(there, list) and isinstance(part, int)):
            names.append(str(part))
            there = there.get(part) if isinstance(there, dict) else there[int(part)]
    return ".".join(names)


def refuse(document: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise BadRequest for the first field that asks for something; `neutral` says which values of which fields do not.

    A field that is not there, or null, asks for nothing.
    """
    for name, harmless in neutral.items():
        value = document.get(name)
        if value is not None and not any(value == each and type(value) is type(each) for each in harmless):
            raise BadRequest(f"{name}: {shown(value)} is not supported; leave it out")


def texts(name: str, values: Sequence[bytes]) -> Tensor:
    """A tensor of one element an item."""
    return Tensor(name, "BYTES", np.array(values, dtype=object))


def prompt_tokens(outputs: Mapping[str, Tensor]) -> int:
    """Tokens of the inputs, where the pipeline counts them."""
    counts = outputs.get(TOKEN_COUNT)
    return int(counts.array.sum()) if counts is not None else 0


def event(document: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % orjson.dumps(document)


async def with_errors(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """The events, and after the first one errors among them: the status is out by then. No `[DONE]` follows an error."""
    async with aclosing(events):
        try:
            async for each in events:
                yield each
        except TaskError as error:
            yield event(error_shape(error))
        except Exception as error:  # as in `hotpath.Endpoint`
            log.error("a stream failed", exc_info=error)
            yield event(error_shape(InternalFailure.of(error)))


def _model(plan: Plan) -> dict[str, Any]:
    return {
        "id": plan.pipeline.name,
        "object": "model",
        "created": 0,
        "owned_by": "espalier",
        "weights": plan.weights,
        "routes": routes(plan),
    }


def _vector(row: Array, encoding: str) -> Any:
    values = np.ascontiguousarray(row, dtype="<f4")
    return base64.b64encode(values.tobytes()).decode() if encoding == "base64" else values
