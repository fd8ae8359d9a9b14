"""What the Open Inference Protocol asks of every server, beside inference: health, metadata, and errors in one shape."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from models.manifest import TensorSpec
from services.dataplane.errors import TaskError

EXTENSIONS = ("binary_tensor_data",)


def new_app(title: str, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """An empty app. No /docs page: it would load its scripts from afar, and edge sites are cut off; /openapi.json is there."""
    off: Any = {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}
    return FastAPI(title=title, lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=off)


def tensor_metadata(tensor: TensorSpec) -> dict[str, Any]:
    """A tensor as OIP tells it: a symbolic axis is -1; beside it, what an input is where a request leaves it out."""
    told = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": [-1 if isinstance(axis, str) else axis for axis in tensor.shape],
    }
    return told if tensor.default is None else {**told, "optional": True, "default": tensor.default}


def readiness(ready: bool, name: str | None = None) -> JSONResponse:
    """200 {"ready": true} or 503 {"ready": false}."""
    body: dict[str, Any] = {"ready": ready} if name is None else {"name": name, "ready": ready}
    return JSONResponse(body, 200 if ready else 503)


def add_server_routes(app: FastAPI, ready: Callable[[], bool]) -> None:
    """Health and server metadata."""

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def server_ready() -> JSONResponse:
        return readiness(ready())

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return {"name": "espalier", "version": version("espalier"), "extensions": list(EXTENSIONS)}


def add_error_shape(app: FastAPI) -> None:
    """Errors of FastAPI's own routes in the shape of every other error: {"error", "reason", ...}."""

    async def task_error(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, TaskError):
            raise error
        return JSONResponse(error.body(), error.status, {k.decode(): v.decode() for k, v in error.headers()})

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        reason = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        detail = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse({"error": detail, "reason": reason}, error.status_code, dict(error.headers or {}))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            raise error
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{where}: {first['msg']}", "reason": "bad_request"}, 400)

    app.add_exception_handler(TaskError, task_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)
