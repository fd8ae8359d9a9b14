"""How soon more capacity is routed: a standby let out, and a replica started from nothing, as processes and as containers.

From the operator's order to the moment at which the gateway has applied routes with the replica in them. The order begins a
slot at once, so the decision is part of it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from orchestrator.client import Client, connect
from orchestrator.state_dir import StateDir

TESTBED = Path(__file__).parents[1] / "system" / "composed.yaml"
POLL_S = 0.002
LIMIT_S = 60.0
ROUNDS = 5


async def measure(model: Path, runtime: str) -> dict[str, Any]:
    """`let_out_s` and `cold_start_s` of one runtime: medians over a few rounds [s]."""
    standby, cold = [], []
    with _up(model.parent, runtime) as client:
        for _ in range(ROUNDS):
            _settle(client, "tokenise", 1, 1)
            standby.append(_timed(client, "tokenise", 2, 0))
            _settle(client, "pool", 2, 0)
            cold.append(_timed(client, "pool", 3, 0))
    return {f"let_out_{runtime}_s": sorted(standby)[ROUNDS // 2], f"cold_start_{runtime}_s": sorted(cold)[ROUNDS // 2]}


@contextmanager
def _up(models: Path, runtime: str) -> Iterator[Client]:
    with tempfile.TemporaryDirectory() as scratch:
        state = ["--state-dir", scratch]
        try:
            _espalier("up", str(TESTBED), "--models-dir", str(models), "--runtime", runtime, *state)
            with connect(StateDir(Path(scratch))) as client:
                yield client
        finally:
            _espalier("down", *state)


def _espalier(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "orchestrator", *arguments], check=True, capture_output=True)


def _settle(client: Client, service: str, replicas: int, standby: int) -> None:
    client.scale(service, replicas, standby)
    for _ in client.watch(LIMIT_S, lambda status: all(each["settled"] for each in status["services"].values())):
        pass


def _timed(client: Client, service: str, replicas: int, standby: int) -> float:
    gateway = client.status()["gateway"]["url"]
    with httpx.Client(trust_env=False) as page:
        began = time.perf_counter()
        client.scale(service, replicas, standby)
        while client.status()["services"][service]["states"]["ready"] < replicas:
            time.sleep(POLL_S)
        version = client.status()["version"]
        while _applied(page.get(f"{gateway}/metrics").text) < version:
            time.sleep(POLL_S)
        return time.perf_counter() - began


def _applied(page: str) -> float:
    """Version of the routes that the gateway has."""
    (line,) = [line for line in page.splitlines() if line.startswith("espalier_gateway_routes_version ")]
    return float(line.split()[1])
