"""Answers per second when everything is busy: split over processes against the same encoders in one process, same cores."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from services.transport import Transport
from tests.bench.house import house
from tests.bench.work import OneProcess, Request, texts
from tests.services.minilm import PIPELINES

ROUNDS = 4
TASKS = 200
PER_ENCODER = 4
"""Requests kept going per encoder."""


async def measure(model: Path) -> dict[str, Any]:
    """`throughput_ratio`: split over one process, the two in turns so that the machine's moods fall on both."""
    encoders = len(os.sched_getaffinity(0))
    together = OneProcess(model)
    samples = texts(TASKS)
    requests = [Request(text) for text in samples]
    split_s = whole_s = 0.0
    loop = asyncio.get_running_loop()
    async with house(model, {"tokenise": 1, "encode": encoders, "pool": 1}, PIPELINES[:1]) as up, Transport() as transport:
        url = f"{up.gateway}/v2/models/embed/infer"
        with ThreadPoolExecutor(encoders) as pool:
            for turn in range(ROUNDS + 1):
                start = time.perf_counter()
                await _all(transport, url, requests, encoders * PER_ENCODER)
                middle = time.perf_counter()
                await asyncio.gather(*(loop.run_in_executor(pool, together.embed, text) for text in samples))
                end = time.perf_counter()
                if turn:  # the first round warms both up
                    split_s += middle - start
                    whole_s += end - middle
    done = ROUNDS * TASKS
    return {
        "throughput_ratio": whole_s / split_s,
        "split_per_s": done / split_s,
        "one_process_per_s": done / whole_s,
        "encoders": encoders,
    }


async def capacity_per_s(url: str, transport: Transport, count: int) -> float:
    """Tasks per second one encoder finishes when it always has some waiting."""
    requests = [Request(text) for text in texts(count, seed=2)]
    await _all(transport, url, requests[: count // 4], PER_ENCODER)
    start = time.perf_counter()
    await _all(transport, url, requests, PER_ENCODER)
    return count / (time.perf_counter() - start)


async def _all(transport: Transport, url: str, requests: list[Request], at_once: int) -> None:
    """Send every request, `at_once` at a time."""
    left = iter(requests)

    async def sender() -> None:
        for request in left:
            answer = await request.send(transport, url)
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {answer.body!r}")

    await asyncio.gather(*(sender() for _ in range(at_once)))
