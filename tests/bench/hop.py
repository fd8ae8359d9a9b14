"""What splitting costs: a task through gateway and three stages, less the same work in one process, text by text.

The two take turns in short blocks over the same texts, so that whatever else the machine does falls on both, and neither finds
its caches swept by the other before every single task. Concurrency 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.manifest import Precision
from services.transport import Transport
from tests.bench.house import house
from tests.bench.work import OneProcess, Request, quantile, texts, timed
from tests.services.minilm import PIPELINES

BLOCK = 25
BLOCKS = 24
WARM_UP = 2
"""Blocks that do not count."""


async def measure(model: Path, precision: Precision) -> dict[str, Any]:
    """Overhead and the two latencies it is the difference of, each {p50, p99} in seconds."""
    together = OneProcess(model, precision)
    replicas = {"tokenise": 1, "encode": 1, "pool": 1}
    split, whole = [], []
    async with house(model, replicas, PIPELINES[:1], precision=precision) as up, Transport() as transport:
        url = f"{up.gateway}/v2/models/embed/infer"
        for number in range(WARM_UP + BLOCKS):
            samples = texts(BLOCK, seed=number)
            apart = await block(samples, transport, url)
            alone = [timed(together.embed, text) for text in samples]
            if number >= WARM_UP:
                split += apart
                whole += alone
    return {
        "overhead_s": quantiles([a - b for a, b in zip(split, whole, strict=True)]),
        "split_latency_s": quantiles(split),
        "one_process_latency_s": quantiles(whole),
        "tasks": len(split),
        "precision": precision,
    }


async def block(samples: Sequence[bytes], transport: Transport, url: str) -> list[float]:
    """Latency of each text on its own [s]."""
    return [await _latency(Request(text), transport, url) for text in samples]


async def _latency(request: Request, transport: Transport, url: str) -> float:
    start = time.perf_counter()
    answer = await request.send(transport, url)
    elapsed = time.perf_counter() - start
    if answer.status != 200:
        raise RuntimeError(f"HTTP {answer.status}: {answer.body!r}")
    return elapsed


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The two that are reported."""
    return {"p50": quantile(seconds, 0.5), "p99": quantile(seconds, 0.99)}


async def floor(model: Path) -> dict[str, Any]:
    """`http_floor_s`: one small request to a stage that does next to nothing, on a kept connection: a hop's least time."""
    async with house(model, {"tokenise": 1}, []) as up, Transport() as transport:
        url = f"{up.stages['tokenise']}/v2/models/tokenise/infer"
        times = [await _latency(Request(b"a"), transport, url) for _ in range(2 * BLOCK * BLOCKS)]
    return {"http_floor_s": quantile(times[len(times) // 2 :], 0.5)}
