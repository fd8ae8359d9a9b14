"""What a gateway alone can do: requests per second of its own processor time, before a stage that does nothing."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from models import manifest
from models.manifest import Manifest, StageSpec, TensorSpec
from services.dataplane.pipeline import Pipeline, Step
from services.transport import Transport
from tests.bench.house import cpu_s, house
from tests.bench.work import Request

REQUESTS = 6000
WARM_UP = 1000
CONCURRENCY = 16


def no_op(directory: Path) -> Path:
    """A model of one stage that hands its text back."""
    text = TensorSpec(name="text", datatype="BYTES", shape=("batch",))
    stage = StageSpec(
        name="echo",
        tier="light",
        processor="echo",
        inputs=(text,),
        outputs=(text.model_copy(update={"name": "same"}),),
        files={"float32": ()},
    )
    manifest.save(
        Manifest(model="nothing", source="made for the bench", architecture="none", weights="seeded", stages=(stage,)),
        directory,
    )
    return directory


async def measure() -> dict[str, Any]:
    """`gateway_rps_per_core`: requests over the gateway's processor seconds; and the rate seen on this machine, where the
    sender and the stage take their share of the same cores."""
    step = Step(id="echo", service="echo", inputs={"text": "request.text"})
    pipeline = Pipeline(name="nothing", deadline_s=20.0, epsilon=0.05, steps=(step,), outputs={"same": "echo.same"})
    request = Request(b"The train to the coast leaves at nine.")
    with tempfile.TemporaryDirectory() as directory:
        async with house(no_op(Path(directory)), {"echo": 1}, [pipeline]) as up, Transport() as transport:
            url = f"{up.gateway}/v2/models/nothing/infer"

            async def send(count: int) -> None:
                for _ in range(count):
                    answer = await request.send(transport, url)
                    if answer.status != 200:
                        raise RuntimeError(f"HTTP {answer.status}: {answer.body!r}")

            await asyncio.gather(*(send(WARM_UP // CONCURRENCY) for _ in range(CONCURRENCY)))
            used, start = cpu_s(up.processes["gateway"]), time.perf_counter()
            await asyncio.gather(*(send(REQUESTS // CONCURRENCY) for _ in range(CONCURRENCY)))
            elapsed = time.perf_counter() - start
            used = cpu_s(up.processes["gateway"]) - used
    sent = REQUESTS // CONCURRENCY * CONCURRENCY
    return {"gateway_rps_per_core": sent / used, "gateway_rps_seen": sent / elapsed, "gateway_requests": sent}
