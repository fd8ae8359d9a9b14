"""The gateway's FastAPI app: the routes around one `GatewayService`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from services import exposition, oip
from services.dataplane.errors import NotFound, TaskError
from services.dataplane.routing import RouteBook
from services.dataplane.wire import Limits
from services.gateway.announcer import Announcer
from services.gateway.completions import Completions
from services.gateway.metrics import GatewayMetrics
from services.gateway.openai import OpenAI, error_shape
from services.gateway.service import VERSION, GatewayService, Trace
from services.gateway.subscription import Subscription
from services.gateway.table import Plan, Table
from services.gateway.transcriptions import Transcriptions
from services.hotpath import Answer, Endpoint, ErrorShape, Front, Request, Stream
from services.transport import Transport


class Gateway:
    """A gateway process: its routes, its connections, its counters."""

    def __init__(
        self,
        *,
        name: str,
        node: str,
        routes_urls: Sequence[str] = (),
        routes_file: Path | None,
        port: int | None = None,
        limits: Limits | None = None,
        max_in_flight: int = 4096,
    ) -> None:
        self.metrics = GatewayMetrics()
        self.limits = limits or Limits()
        self.draining = False
        self._node = node
        self._max_in_flight = max_in_flight
        self._book = RouteBook()
        self._service: GatewayService | None = None
        self._announcer: Announcer | None = None
        self.subscription = Subscription(routes_urls, routes_file, name, self._changed, node=node, port=port)

    def _changed(self, table: Table) -> None:
        self._book.forget_all_but(replica.id for service in table.routes.services.values() for replica in service.replicas)
        self.metrics.routes(table.routes.version, table.plans.values())
        if self._announcer is not None:
            self._announcer.settle(table)

    def _refused(self, service: str, replica: str) -> None:
        self.subscription.table.take_back(service, replica)

    @property
    def in_flight(self) -> int:
        """Tasks not answered yet."""
        return self._service.in_flight if self._service is not None else 0

    @property
    def ready(self) -> bool:
        """It has routes, at least one pipeline is served, and it is not draining."""
        table = self.subscription.table
        return not self.draining and any(table.ready(name) for name in table.plans)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[GatewayService]:
        """Open the connections and follow the routes; undo both on the way out."""
        async with Transport() as transport:
            announcer = self._announcer = Announcer(lambda: self.subscription.url, transport, self._refused)
            service = GatewayService(
                self.subscription,
                transport,
                self.metrics,
                self._book,
                node=self._node,
                limits=self.limits,
                max_in_flight=self._max_in_flight,
                let_out=announcer.tell,
            )
            self._service = service
            self.metrics.watch(in_flight=lambda: service.in_flight)
            following = asyncio.ensure_future(self.subscription.follow(transport))
            try:
                yield service
            finally:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following
                await announcer.close()

    def plan(self, model: str, version: str | None) -> Plan:
        """The pipeline of that name, or NotFound."""
        if self._service is None:
            raise NotFound("the gateway is not serving")
        return self._service.plan(model, version or VERSION)


def build(gateway: Gateway) -> Front:
    """The app of one gateway."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running() as service:
            openai = OpenAI(service)
            completions, transcriptions = Completions(service), Transcriptions(service)
            limit = gateway.limits.body_bytes

            def endpoint(work: Callable[[Request, Trace], Awaitable[Answer | Stream]], shape: ErrorShape) -> Endpoint:
                async def serve(request: Request) -> Answer | Stream:
                    return await service.serve(request, work)

                return Endpoint(serve, body_limit=limit, shape=shape)

            front.open(
                endpoint(service.infer, TaskError.body),
                {
                    "/v1/embeddings": endpoint(openai.embeddings, error_shape),
                    "/v1/completions": endpoint(completions.completions, error_shape),
                    "/v1/chat/completions": endpoint(completions.chat, error_shape),
                    "/v1/audio/transcriptions": endpoint(transcriptions.transcriptions, error_shape),
                },
            )
            app.add_api_route("/v1/models", openai.models, methods=["GET"])
            app.add_api_route("/v1/models/{model}", openai.model, methods=["GET"])
            yield

    app = oip.new_app("Espalier gateway", lifespan)
    front = Front(app)
    oip.add_error_shape(app)
    oip.add_server_routes(app, lambda: gateway.ready)

    @app.get("/v2/models/{model}")
    @app.get("/v2/models/{model}/versions/{version}")
    async def metadata(model: str, version: str | None = None) -> dict[str, Any]:
        plan = gateway.plan(model, version)
        return {
            "name": model,
            "versions": [VERSION],
            "platform": "espalier_pipeline",
            "inputs": [oip.tensor_metadata(tensor) for tensor in plan.inputs.values()],
            "outputs": [oip.tensor_metadata(tensor) for tensor in plan.outputs.values()],
            "parameters": {
                "deadline_s": plan.pipeline.deadline_s,
                "token_deadline_s": plan.pipeline.token_deadline_s,
                "weights": plan.weights,
                "epsilon": plan.pipeline.epsilon,
                "steps": [{"id": step.id, "service": step.service} for step in plan.pipeline.steps],
            },
        }

    @app.get("/v2/models/{model}/ready")
    @app.get("/v2/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> JSONResponse:
        gateway.plan(model, version)
        return oip.readiness(gateway.subscription.table.ready(model) and not gateway.draining, name=model)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.exposition(), media_type=exposition.MEDIA_TYPE)

    return front
