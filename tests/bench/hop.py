"""What splitting costs: a task through gateway and three stages, less the same work in one process, text by text.

The two are interleaved, so that whatever else the machine does falls on both. Concurrency 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

from services.transport import Transport
from tests.bench.house import house
from tests.bench.work import OneProcess, Request, quantile, texts, timed
from tests.services.minilm import PIPELINES

TASKS = 600
WARM_UP = 100


async def measure(model: Path) -> dict[str, Any]:
    """`hop_overhead_s` {p50, p99}, and the two latencies it is the difference of, all in seconds."""
    together = OneProcess(model)
    async with house(model, {"tokenise": 1, "encode": 1, "pool": 1}, PIPELINES[:1]) as up, Transport() as transport:
        url = f"{up.gateway}/v2/models/embed/infer"
        split, whole = [], []
        for index, text in enumerate(texts(TASKS + WARM_UP)):
            request = Request(text)
            start = time.perf_counter()
            answer = await request.send(transport, url)
            elapsed = time.perf_counter() - start
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {answer.body!r}")
            alone = await asyncio.to_thread(timed, together.embed, text)
            if index >= WARM_UP:
                split.append(elapsed)
                whole.append(alone)
    overhead = [a - b for a, b in zip(split, whole, strict=True)]
    return {
        "hop_overhead_s": {"p50": quantile(overhead, 0.5), "p99": quantile(overhead, 0.99)},
        "split_latency_s": {"p50": quantile(split, 0.5), "p99": quantile(split, 0.99)},
        "one_process_latency_s": {"p50": quantile(whole, 0.5), "p99": quantile(whole, 0.99)},
        "tasks": TASKS,
    }


async def floor(model: Path) -> dict[str, Any]:
    """`http_floor_s`: one small request to a stage that does next to nothing, on a kept connection: a hop's least time."""
    with contextlib.ExitStack():
        async with house(model, {"tokenise": 1}, []) as up, Transport() as transport:
            request = Request(b"a")
            url = f"{up.stages['tokenise']}/v2/models/tokenise/infer"
            times = []
            for index in range(2 * TASKS):
                start = time.perf_counter()
                await request.send(transport, url)
                if index >= TASKS:
                    times.append(time.perf_counter() - start)
    return {"http_floor_s": quantile(times, 0.5)}
