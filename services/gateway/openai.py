"""The OpenAI API over pipelines: `POST /v1/embeddings` and `GET /v1/models`.

A pipeline is an embedding model when it takes one BYTES tensor of texts and answers a tensor named `embedding`. Source: the
published OpenAPI document of the OpenAI API (2.3.0), embeddings.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.dataplane.errors import BadRequest, TaskError
from services.dataplane.wire import Array, Tensor
from services.gateway.service import GatewayService, Trace, server_timing
from services.gateway.table import Plan
from services.hotpath import JSON, Answer, Request

EMBEDDING, TOKEN_COUNT = "embedding", "token_count"


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
    """The routes, over one gateway."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def models(self) -> dict[str, Any]:
        """`GET /v1/models`: the pipelines these routes can serve."""
        names = [name for name, plan in self._service.table.plans.items() if text_input(plan) is not None]
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "espalier"} for name in names],
        }

    async def embeddings(self, asked: Request, trace: Trace) -> Answer:
        """`POST /v1/embeddings`, by way of `GatewayService.serve`."""
        with self._service.reading():
            request = _parse(asked.body)
            plan = self._service.plan(request.model)
            name = text_input(plan)
            if name is None:
                raise BadRequest(f"pipeline {request.model!r} makes no embeddings of texts; see /v1/models")
            length = plan.outputs[EMBEDDING].shape[-1]
            if request.dimensions is not None and request.dimensions != length:
                raise BadRequest(f"dimensions: model {request.model!r} has {length} and cannot be cut")
            until = self._service.deadline(plan, asked, {})
        texts = [request.input] if isinstance(request.input, str) else request.input
        array = np.empty(len(texts), dtype=object)
        array[:] = [text.encode() for text in texts]
        tensors = {f"request.{name}": Tensor(name, "BYTES", array)}
        answered = await self._service.run(plan, tensors, until, trace)
        counts = answered.tensors.get(TOKEN_COUNT)
        used = int(counts.array.sum()) if counts is not None else 0
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


def text_input(plan: Plan) -> str | None:
    """Name of the one tensor of texts an embedding pipeline takes; None for any other pipeline."""
    if EMBEDDING not in plan.outputs or len(plan.inputs) != 1:
        return None
    name, spec = next(iter(plan.inputs.items()))
    return name if spec.datatype == "BYTES" and len(spec.shape) == 1 else None


def _parse(body: bytes) -> EmbeddingsRequest:
    try:
        return EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise BadRequest(f"{where}: {first['msg']}") from None


def _vector(row: Array, encoding: str) -> Any:
    values = np.ascontiguousarray(row, dtype="<f4")
    return base64.b64encode(values.tobytes()).decode() if encoding == "base64" else values
