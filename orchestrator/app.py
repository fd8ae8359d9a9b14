"""The control plane's HTTP face: routes for gateways, status and orders for operators, metrics for Prometheus.

Thin: every endpoint reads or calls one method of the `Controls` it is given. It listens on the loopback interface only.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field

from orchestrator.errors import Conflict, EspalierError, Infeasible, UsageError
from orchestrator.routes import Caller
from services.dataplane.document import Document
from services.dataplane.routes import Routes

REASONS = {400: "bad_request", 409: "infeasible", 423: "busy", 503: "unavailable"}
"""Machine-readable reason of each status; the data plane's errors have the same shape."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Scale(Document):
    """`POST /v1/scale`."""

    service: str
    replicas: int | None = Field(ge=0, le=1000)
    """None takes an earlier order back: the policy decides again."""
    standby: int | None = Field(default=None, ge=0, le=1000)
    """None leaves it as it is."""


class LetOut(Document):
    """`POST /v1/let-out`."""

    service: str = Field(max_length=256)
    replica: str = Field(max_length=256)


class Drain(Document):
    """`POST /v1/drain` and `POST /v1/undrain`."""

    node: str = Field(max_length=256)


class Restart(Document):
    """`POST /v1/restart`."""

    services: list[str] | None = None
    """None: all of them."""


class Update(Document):
    """`POST /v1/update`."""

    testbed: str = Field(max_length=1 << 20)
    """Text of the testbed file."""
    name: str = Field(default="testbed", max_length=4096)
    """What to call the file in messages."""
    limit: float = Field(default=300.0, gt=0, le=3600)
    """Longest time until everything new is ready [s]; then the old state comes back."""


class Probe(Document):
    """`POST /v1/probe`."""

    between: tuple[str, str]
    """Two nodes."""


class Controls(Protocol):
    """What the control plane can do."""

    def status(self) -> dict[str, Any]:
        """The document of `GET /v1/status`."""

    def exposition(self) -> bytes:
        """The page of `GET /metrics`."""

    def targets(self) -> list[dict[str, Any]]:
        """The document of `GET /v1/targets`."""

    async def routes(self, after: int, wait_s: float, gateway: Caller | None) -> Routes | None:
        """The routes as soon as their version is not `after`; None when `wait_s` passed first."""

    def scale(self, service: str, replicas: int | None, standby: int | None) -> None:
        """Order a number of replicas."""

    def let_out(self, service: str, replica: str) -> None:
        """Put a standby to work that a gateway has let out."""

    def restart(self, services: list[str] | None) -> None:
        """Order that every replica be replaced."""

    def update(self, text: str, name: str, limit_s: float) -> None:
        """Begin to replace the testbed by another version of it."""

    def drain(self, node: str) -> None:
        """Order that a node be emptied, and stay so."""

    def undrain(self, node: str) -> None:
        """Take that back."""

    async def probe(self, a: str, b: str) -> dict[str, Any]:
        """Measure the link between two nodes."""

    def shut_down(self) -> None:
        """Begin to drain and stop everything, then end."""


def build(controls: Controls) -> FastAPI:
    """The application."""
    app = FastAPI(title="Espalier control plane", docs_url=None, redoc_url=None)

    @app.exception_handler(EspalierError)
    async def refuse(_: Request, error: EspalierError) -> JSONResponse:
        kinds = {Infeasible: 409, Conflict: 423, UsageError: 400}
        status = next((status for kind, status in kinds.items() if isinstance(error, kind)), 503)
        return JSONResponse({"error": str(error), "reason": REASONS[status]}, status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": f"{field}: {first['msg']}", "reason": REASONS[400]}, 400)

    @app.get("/v1/routes")
    async def routes(
        request: Request,
        after: Annotated[int, Query(ge=0)] = 0,
        wait: Annotated[float, Query(ge=0, le=60)] = 0.0,
        gateway: Annotated[str | None, Query(max_length=128)] = None,
        node: Annotated[str, Query(max_length=128)] = "",
        port: Annotated[int | None, Query(ge=1, le=65535)] = None,
    ) -> Response:
        caller = None if gateway is None else Caller(gateway, node, _address(request, port))
        found = await controls.routes(after, wait, caller)
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

    @app.post("/v1/let-out")
    async def let_out(standby: LetOut) -> JSONResponse:
        controls.let_out(standby.service, standby.replica)
        return JSONResponse({"let_out": True})

    @app.post("/v1/restart", status_code=202)
    async def restart(order: Restart) -> JSONResponse:
        controls.restart(order.services)
        return JSONResponse({"accepted": True}, 202)

    @app.post("/v1/update", status_code=202)
    async def update(order: Update) -> JSONResponse:
        controls.update(order.testbed, order.name, order.limit)
        return JSONResponse({"accepted": True}, 202)

    @app.post("/v1/drain", status_code=202)
    async def drain(order: Drain) -> JSONResponse:
        controls.drain(order.node)
        return JSONResponse({"accepted": True}, 202)

    @app.post("/v1/undrain", status_code=202)
    async def undrain(order: Drain) -> JSONResponse:
        controls.undrain(order.node)
        return JSONResponse({"accepted": True}, 202)

    @app.post("/v1/probe")
    async def probe(asked: Probe) -> JSONResponse:
        return JSONResponse(await controls.probe(*asked.between))

    @app.post("/v1/shutdown", status_code=202)
    async def shut_down() -> JSONResponse:
        controls.shut_down()
        return JSONResponse({"accepted": True}, 202)

    @app.get("/v1/targets")
    async def targets() -> JSONResponse:
        return JSONResponse(controls.targets())

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(controls.exposition(), media_type=METRICS_TYPE)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"live": True})

    return app


def waiting() -> FastAPI:
    """The application of an orchestrator that waits for its turn: it lives, and everything else is to be asked of another one.

    Every connection ends with its answer, so that who comes by a name that stands for several soon meets the one that leads.
    """
    app = FastAPI(title="Espalier control plane", docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"live": True, "leads": False}, headers={"connection": "close"})

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def elsewhere(path: str) -> JSONResponse:
        error = {"error": f"/{path}: this orchestrator waits; another one leads", "reason": REASONS[503]}
        return JSONResponse(error, 503, {"connection": "close"})

    return app


def _address(request: Request, port: int | None) -> str:
    """Where who asks can be reached: a container knows its port, and not the address that others see it under."""
    if port is None or request.client is None:
        return ""
    host = request.client.host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
