"""The control plane's HTTP face: routes for gateways, status and orders for operators, metrics for Prometheus.

Thin: every endpoint reads or calls one method of the `Controls` it is given. It listens on the loopback interface only.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field

from orchestrator.errors import EspalierError, Infeasible, UsageError
from services.dataplane.document import Document
from services.dataplane.routes import Routes

REASONS = {400: "bad_request", 409: "infeasible", 503: "unavailable"}
"""Machine-readable reason of each status; the data plane's errors have the same shape."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Scale(Document):
    """`POST /v1/scale`."""

    service: str
    replicas: int = Field(ge=0, le=1000)
    standby: int | None = Field(default=None, ge=0, le=1000)
    """None leaves it as it is."""


class Restart(Document):
    """`POST /v1/restart`."""

    services: list[str] | None = None
    """None: all of them."""


class Controls(Protocol):
    """What the control plane can do."""

    def status(self) -> dict[str, Any]:
        """The document of `GET /v1/status`."""

    def exposition(self) -> bytes:
        """The page of `GET /metrics`."""

    async def routes(self, after: int, wait_s: float, gateway: str | None) -> Routes | None:
        """The routes as soon as their version is not `after`; None when `wait_s` passed first."""

    def scale(self, service: str, replicas: int, standby: int | None) -> None:
        """Order a number of replicas."""

    def restart(self, services: list[str] | None) -> None:
        """Order that every replica be replaced."""

    def shut_down(self) -> None:
        """Begin to drain and stop everything, then end."""


def build(controls: Controls) -> FastAPI:
    """The application."""
    app = FastAPI(title="Espalier control plane", docs_url=None, redoc_url=None)

    @app.exception_handler(EspalierError)
    async def refuse(_: Request, error: EspalierError) -> JSONResponse:
        status = 409 if isinstance(error, Infeasible) else 400 if isinstance(error, UsageError) else 503
        return JSONResponse({"error": str(error), "reason": REASONS[status]}, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{field}: {first['msg']}", "reason": REASONS[400]}, 400)

    @app.get("/v1/routes")
    async def routes(
        after: Annotated[int, Query(ge=0)] = 0,
        wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
        gateway: Annotated[str | None, Query(max_length=128)] = None,
    ) -> Response:
        found = await controls.routes(after, wait, gateway)
        if found is None:
            return Response(status_code=304)
        return Response(found.model_dump_json(), media_type="application/json")

    @app.get("/v1/status")
    async def status() -> JSONResponse:
        return JSONResponse(controls.status())

    @app.post("/v1/scale", status_code=202)
    async def scale(order: Scale) -> JSONResponse:
        controls.scale(order.service, order.replicas, order.standby)
        return JSONResponse({"accepted": True}, 202)

    @app.post("/v1/restart", status_code=202)
    async def restart(order: Restart) -> JSONResponse:
        controls.restart(order.services)
        return JSONResponse({"accepted": True}, 202)

    @app.post("/v1/shutdown", status_code=202)
    async def shut_down() -> JSONResponse:
        controls.shut_down()
        return JSONResponse({"accepted": True}, 202)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(controls.exposition(), media_type=METRICS_TYPE)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"live": True})

    return app
