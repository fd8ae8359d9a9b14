"""The stage's FastAPI app: the Open Inference Protocol's routes around one `StageService`.

Inference goes by `services.hotpath.Front`; the rest are FastAPI's own.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from models.manifest import Manifest, StageSpec
from services import exposition, oip
from services.dataplane.errors import NotFound
from services.dataplane.routing import RetryBudget, RouteBook
from services.dataplane.service_time import ServiceEstimate
from services.dataplane.wire import Limits
from services.forward import Forwarder
from services.hotpath import Endpoint, Front
from services.stage import generation, probe
from services.stage.generation import GenerationWorker
from services.stage.metrics import StageMetrics
from services.stage.onward import VERSION, AnyWorker, Identity
from services.stage.parts import PartWorker, Rest
from services.stage.processors import Exemplary, Processor
from services.stage.processors.generate import Generate
from services.stage.processors.generate_part import Part
from services.stage.service import StageService
from services.stage.warm import warm_up
from services.stage.worker import ALONE_S, Worker
from services.transport import Transport

IN_FLIGHT_PER_PLACE = 4
"""Requests held in all, per place in the queue: a light stage's tasks wait for later hops, not in its queue."""


class Replica:
    """A stage, opened; warmed when it starts to run, and served until it is drained."""

    def __init__(
        self,
        model: Manifest,
        spec: StageSpec,
        processor: Processor,
        identity: Identity,
        *,
        cpus: float = 1.0,
        queue_capacity: int = 256,
        max_batch: int | None = None,
        alone_s: float = ALONE_S,
        limits: Limits | None = None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.metrics = StageMetrics(identity.service, identity.node)
        self.draining = False
        self._processor = processor
        self._identity = identity
        # A batch a processor, with one thread each: two batches at once do twice the work, two threads on one do 1.5 times.
        self._slots = max(1, int(cpus))
        self._queue_capacity = queue_capacity
        self._max_batch = spec.max_batch if max_batch is None else min(max_batch, spec.max_batch)
        self._alone_s = 0.0 if isinstance(processor, Exemplary) else alone_s
        self._limits = limits or Limits()
        self._service: StageService | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StageService]:
        """Warm up, start the worker and open the connections; undo it in reverse on the way out."""
        async with Transport() as transport:
            forwarder = Forwarder(transport, RouteBook(), RetryBudget())
            # Nobody is served yet, so nobody minds that warming up holds the event loop.
            worker = self._worker(forwarder)
            in_flight = self._queue_capacity * IN_FLIGHT_PER_PLACE
            service = StageService(
                self.spec, self._identity, worker, forwarder, self.metrics, limits=self._limits, max_in_flight=in_flight
            )
            self.metrics.watch(
                queue_length=lambda: len(worker.queue),
                in_flight=lambda: service.in_flight,
                wait=lambda: worker.expected_wait_s(time.monotonic()),
            )
            self._service = service
            try:
                yield service
            finally:
                self._service = None
                await worker.stop()

    def _worker(self, forwarder: Forwarder) -> AnyWorker:
        length = self.model.typical_length
        if isinstance(self._processor, Generate):
            pace = generation.warm_up(self._processor, length, self._max_batch)
            return GenerationWorker(
                self._processor,
                pace,
                self.metrics,
                capacity=self._queue_capacity,
                max_batch=self._max_batch,
                rest=Rest(forwarder, self._limits) if self._processor.parts > 1 else None,
            )
        if isinstance(self._processor, Part):
            law = warm_up(self.spec, self._processor, length)
            return PartWorker(self.spec, self._processor, ServiceEstimate(law), self.metrics)
        return Worker(
            self.spec,
            self._processor,
            ServiceEstimate(warm_up(self.spec, self._processor, length)),
            self.metrics,
            slots=self._slots,
            capacity=self._queue_capacity,
            max_batch=self._max_batch,
            alone_s=self._alone_s,
        )

    @property
    def ready(self) -> bool:
        """Warmed and not draining."""
        return self._service is not None and not self.draining

    @property
    def in_flight(self) -> int:
        """Requests not answered yet."""
        return self._service.in_flight if self._service is not None else 0

    def metadata(self) -> dict[str, Any]:
        """OIP model metadata."""
        return {
            "name": self._identity.service,
            "versions": [VERSION],
            "platform": "onnx_onnxv1" if self.spec.processor == "onnx" else f"espalier_{self.spec.processor}",
            "inputs": [oip.tensor_metadata(tensor) for tensor in self.spec.inputs],
            "outputs": [oip.tensor_metadata(tensor) for tensor in self.spec.outputs],
            "parameters": {
                "model": self.model.model,
                "weights": self.model.weights,
                "stage": self.spec.name,
                "tier": self.spec.tier,
                "max_batch": self._max_batch,
                "slots": self._slots,
                **self._processor.describe(),
            },
        }

    def check(self, model: str, version: str | None = None) -> None:
        """Raise NotFound unless this replica serves that model and version."""
        if model != self._identity.service or version not in (None, VERSION):
            raise NotFound(
                f"no model {model!r} version {version or VERSION!r} here; this stage serves {self._identity.service!r}"
            )


def build(replica: Replica) -> Front:
    """The app of one replica."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with replica.running() as service:
            front.open(Endpoint(service.infer, body_limit=service.limits.body_bytes))
            yield

    app = oip.new_app(f"Espalier stage {replica.spec.name}", lifespan)
    front = Front(app)
    oip.add_error_shape(app)
    oip.add_server_routes(app, lambda: replica.ready)
    probe.add_routes(app)

    @app.get("/v2/models/{model}")
    @app.get("/v2/models/{model}/versions/{version}")
    async def metadata(model: str, version: str | None = None) -> dict[str, Any]:
        replica.check(model, version)
        return replica.metadata()

    @app.get("/v2/models/{model}/ready")
    @app.get("/v2/models/{model}/versions/{version}/ready")
    async def model_ready(model: str, version: str | None = None) -> JSONResponse:
        replica.check(model, version)
        return oip.readiness(replica.ready, name=model)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(replica.metrics.exposition(), media_type=exposition.MEDIA_TYPE)

    return front
