"""From nothing running to the first answer, and what an idle light stage holds in memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from services.transport import Transport
from tests.bench.house import house
from tests.bench.work import Request
from tests.services.minilm import PIPELINES

LIGHT = ("tokenise", "pool", "classify", "rank")


async def measure(model: Path) -> dict[str, Any]:
    """`start_s`: processes of a whole pipeline started to first answer [s]; `light_resident_bytes` by stage, idle."""
    start = time.perf_counter()
    async with house(model, {"tokenise": 1, "encode": 1, "pool": 1}, PIPELINES[:1]) as up, Transport() as transport:
        answer = await Request(b"first").send(transport, f"{up.gateway}/v2/models/embed/infer")
        start_s = time.perf_counter() - start
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {answer.body!r}")
    async with house(model, dict.fromkeys(LIGHT, 1), []) as up:
        resident = {name: up.processes[f"{name}-0"].memory_info().rss for name in LIGHT}
    return {"start_s": start_s, "light_resident_bytes": resident}
