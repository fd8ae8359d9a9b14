"""More than one encoder can do, for ten seconds: how much is kept, and how soon it is over.

Load at 0.4, 1.2 and 0.4 of the measured capacity for 5, 10 and 9 s, deadline 200 ms, open loop. Beside the measured ratio
stands what a perfect server of the same capacity would keep of the same arrivals: one that knows each task's work beforehand,
wastes none on tasks it cannot finish, and adds nothing of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.transport import Transport
from tests.bench.house import house
from tests.bench.throughput import capacity_per_s
from tests.services.minilm import PIPELINES

DEADLINE_S = 0.2
PHASES = ((5.0, 0.4), (10.0, 1.2), (9.0, 0.4))
"""(seconds, share of capacity)."""
RECOVERY_S = 1.0
CAPACITY_TASKS = 300


async def measure(model: Path, seed: int = 1) -> dict[str, Any]:
    """`overload`: on-time ratio of the whole run, a perfect server's, and the ratio from a second after the load fell."""
    async with house(model, {"tokenise": 1, "encode": 1, "pool": 1}, PIPELINES[:1]) as up:
        async with Transport() as transport:
            capacity = await capacity_per_s(f"{up.gateway}/v2/models/embed/infer", transport, CAPACITY_TASKS)
        arrivals = "step:" + ",".join(f"{share * capacity:.3f}@{seconds:g}s" for seconds, share in PHASES)
        with tempfile.TemporaryDirectory() as directory:
            records = Path(directory, "records.jsonl")
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "loadgen", up.gateway, "--pipeline", f"embed={arrivals}", "--warmup", "0"),
                *("--deadline", f"embed={DEADLINE_S}", "--seed", str(seed), "--records", str(records), "-o", "json", "--quiet"),
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
            report = json.loads(output)
            tasks = [json.loads(line) for line in (await asyncio.to_thread(records.read_text)).splitlines()]
    scheduled = [float(task["scheduled_s"]) for task in tasks]
    on_time = [task["outcome"] == "on_time" for task in tasks]
    fallen = PHASES[0][0] + PHASES[1][0]
    after = [good for start, good in zip(scheduled, on_time, strict=True) if start >= fallen + RECOVERY_S]
    return {
        "overload": {
            "on_time_ratio": sum(on_time) / len(on_time),
            "perfect_on_time_ratio": perfect_ratio(scheduled, 1 / capacity),
            "recovered_on_time_ratio": sum(after) / len(after),
            "capacity_per_s": capacity,
            "sent": len(tasks),
            "outcomes": report["outcomes"],
            "send_lag_s": report["send_lag_s"],
            "valid": report["valid"],
            "deadline_s": DEADLINE_S,
            "seed": seed,
        }
    }


def perfect_ratio(scheduled: Sequence[float], service_s: float) -> float:
    """On-time ratio of a perfect server: tasks in order of arrival, each computed if there is time, and else at no cost."""
    free = 0.0
    kept = 0
    for start in scheduled:
        end = max(free, start) + service_s
        if end <= start + DEADLINE_S:
            free = end
            kept += 1
    return kept / len(scheduled)
