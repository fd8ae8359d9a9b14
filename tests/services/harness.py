"""Real servers for tests: stages and gateways under uvicorn on loopback, in the test's own event loop.

What is made here is small and real: a manifest of a few tensors, a processor the test can hold and let go, HTTP over sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.types import ASGIApp

from models.manifest import Manifest, ModelFile, StageSpec, TensorSpec, Tier, Weights
from services.dataplane import letting_out, routes, wire
from services.dataplane.pipeline import Pipeline, Step
from services.dataplane.routes import Replica as ReplicaRoute
from services.dataplane.routes import Routes, Service
from services.dataplane.wire import Array
from services.gateway import app as gateway_app
from services.gateway.app import Gateway
from services.server import configuration
from services.stage import app as stage_app
from services.stage.app import Replica
from services.stage.onward import Identity
from services.stage.processors import Processor
from services.transport import HttpAnswer, Transport


class _Server(uvicorn.Server):
    """uvicorn, telling when it listens, and leaving the test runner's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


_SERVERS: dict[str, _Server] = {}
"""Those that run, by address."""


def break_off(address: str) -> None:
    """Cut every connection into a server, as the end of its process would."""
    for connection in list(_SERVERS[address].server_state.connections):
        connection.transport.abort()


@asynccontextmanager
async def serving(app: ASGIApp) -> AsyncIterator[str]:
    """Serve an app on a free port of loopback; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    # As uvloop does by itself: an answer in two writes would otherwise wait 40 ms for the first one's acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = _Server(configuration(app, 1.0))
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    waiter = asyncio.ensure_future(server.listening.wait())
    await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiter.cancel()
        await task
    _SERVERS[address] = server
    try:
        yield address
    finally:
        del _SERVERS[address]
        server.should_exit = True
        await task


class Gate:
    """A processor that doubles its input `x` once the test lets it; counts what it computed."""

    inline = False

    def __init__(self, *, open_at_first: bool = False) -> None:
        self.open = threading.Event()
        if open_at_first:
            self.open.set()
        self.entered = threading.Event()
        self.batches: list[list[float]] = []
        self._warm = 12
        """Runs of the warm-up, which pass the gate and are not counted."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self._warm:
            self._warm -= 1
        else:
            self.batches.append([float(v) for v in inputs["x"].reshape(-1)])
            self.entered.set()
            if not self.open.wait(30):
                raise TimeoutError("the test never opened the gate")
        return {"y": inputs["x"] * 2}

    def describe(self) -> dict[str, Any]:
        return {}


class Doubler:
    """As `Gate`, inline and always open."""

    inline = True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"y": inputs["x"] * 2}

    def describe(self) -> dict[str, Any]:
        return {}


def spec(name: str = "double", *, tier: Tier = "core", max_batch: int = 1) -> StageSpec:
    """A stage of one number per item: x [batch] -> y [batch]."""
    files: dict[Any, tuple[ModelFile, ...]] = {"float32": ()}
    tensor = TensorSpec(name="x", datatype="FP32", shape=("batch",))
    return StageSpec(
        name=name,
        tier=tier,
        processor="test",
        inputs=(tensor,),
        outputs=(tensor.model_copy(update={"name": "y"}),),
        files=files,
        max_batch=max_batch,
    )


def replica(processor: Processor, *, name: str = "double", identifier: str | None = None, **options: Any) -> Replica:
    """A replica of such a stage around a processor of the test's."""
    stage = spec(name, max_batch=options.pop("stage_max_batch", 1))
    model = Manifest(model="test", source="made in a test", architecture="none", weights="seeded", stages=(stage,))
    return Replica(model, stage, processor, Identity(name, identifier or f"{name}-0", "local"), alone_s=0.0, **options)


@asynccontextmanager
async def stages(*replicas: Replica) -> AsyncIterator[list[str]]:
    """Serve several replicas."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(serving(stage_app.build(each))) for each in replicas]


def chain(*services: str, deadline_s: float = 5.0, name: str = "task") -> Pipeline:
    """A pipeline that doubles its number once per service."""
    steps = []
    source = "request.x"
    for service in services:
        steps.append(Step(id=service, service=service, inputs={"x": source}))
        source = f"{service}.y"
    return Pipeline(name=name, deadline_s=deadline_s, epsilon=0.05, steps=tuple(steps), outputs={"y": source})


def service(name: str, stage: StageSpec, *urls: str, model: str = "test", weights: Weights = "trained") -> Service:
    """A service of a stage, with replicas NAME-0, NAME-1, ... at these addresses."""
    return Service(
        name=name,
        model=model,
        stage=stage.name,
        tier=stage.tier,
        weights=weights,
        inputs=stage.inputs,
        outputs=stage.outputs,
        replicas=tuple(ReplicaRoute(id=f"{name}-{i}", node="local", url=url, state="ready") for i, url in enumerate(urls)),
    )


def document(pipelines: list[Pipeline], addresses: Mapping[str, list[str]], version: int = 1) -> Routes:
    """Routes to replicas NAME-0, NAME-1, ... of each service at these addresses."""
    services = {name: service(name, spec(name), *urls) for name, urls in addresses.items()}
    return Routes(version=version, testbed="test", services=services, pipelines={p.name: p for p in pipelines})


def with_standbys(kept: Routes, *replicas: str, allowance: int = 1, patience: float = letting_out.SHARE) -> Routes:
    """The document with these replicas on standby, and so many standbys of every service to be let out."""
    services = {
        name: service.model_copy(
            update={
                "replicas": tuple(
                    each.model_copy(update={"state": "standby"}) if each.id in replicas else each for each in service.replicas
                ),
                "allowance": allowance,
                "patience": patience,
            }
        )
        for name, service in kept.services.items()
    }
    return kept.model_copy(update={"services": services})


@asynccontextmanager
async def gateway(kept: Routes, directory: Path, **options: Any) -> AsyncIterator[tuple[str, Gateway]]:
    """A gateway that serves from a document kept on disk; yields its address and itself."""
    path = directory / "routes.json"
    routes.save(kept, path)
    it = Gateway(name="test", node="local", routes_file=path, **options)
    async with serving(gateway_app.build(it)) as address:
        yield address, it


def numbers(*values: float) -> Array:
    """A tensor x [batch]."""
    return np.array(values, dtype=np.float32)


def body(*values: float, **parameters: Any) -> bytes:
    """An all-JSON infer request for these numbers."""
    x = {"name": "x", "shape": [len(values)], "datatype": "FP32", "data": list(values)}
    return json.dumps({"inputs": [x], "parameters": parameters}).encode()


async def infer(
    address: str, model: str, *values: float, headers: Mapping[str, str] | None = None, **parameters: Any
) -> HttpAnswer:
    """One infer request on a connection of its own."""
    async with Transport() as transport:
        url = f"{address}/v2/models/{model}/infer"
        return await transport.post(url, body(*values, **parameters), headers or {}, 30.0)


def result(answer: HttpAnswer) -> list[float]:
    """The numbers of an answer."""
    message = wire.decode_response(answer.body, answer.headers.get(wire.HEADER_LENGTH), wire.Limits())
    return [float(v) for v in message.tensors[0].array]


def reason(answer: HttpAnswer) -> str:
    """The machine-readable reason of an error."""
    return str(json.loads(answer.body)["reason"])


def outcomes(metrics: str, pipeline: str = "task") -> dict[str, int]:
    """Counts of `espalier_requests_total` by outcome, from an exposition page."""
    found = {}
    for line in metrics.splitlines():
        if line.startswith("espalier_requests_total{") and f'pipeline="{pipeline}"' in line:
            found[line.split('outcome="')[1].split('"')[0]] = int(float(line.rsplit(" ", 1)[1]))
    return found
