"""What containers add to a hop: the three-stage pipeline in containers and as processes, less the same work in one process.

All three take turns in short blocks over the same texts. The containers get what the engine runtime gives them: limits, a
read-only root, no capabilities, the bridge network. The client is a process of the host in both cases.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from models import manifest
from models.manifest import Precision
from services.dataplane import routes
from services.transport import Transport
from tests.bench import hop
from tests.bench.house import document, house, ready
from tests.bench.work import OneProcess, quantile, texts, timed
from tests.services.minilm import PIPELINES

STAGES = ("tokenise", "encode", "pool")
TAG = "0.1.0"
HARDENED = ("--init", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--tmpfs", "/tmp")


def possible() -> bool:
    """Whether an engine answers that has the images."""
    return shutil.which("docker") is not None and all(
        subprocess.run(["docker", "image", "inspect", f"espalier/{name}:{TAG}"], capture_output=True, check=False).returncode
        == 0
        for name in ("stage", "gateway")
    )


async def measure(model: Path, precision: Precision = "int8") -> dict[str, Any]:
    """`container_hop_ratio`: overhead p50 in containers over that of processes; and both overheads {p50, p99} [s]."""
    together = OneProcess(model, precision)
    split: dict[str, list[float]] = {"processes": [], "containers": []}
    whole: list[float] = []
    async with (
        house(model, dict.fromkeys(STAGES, 1), PIPELINES[:1], precision=precision) as processes,
        _containers(model, precision) as gateway,
        Transport() as transport,
    ):
        urls = {
            name: f"{door}/v2/models/embed/infer" for name, door in (("processes", processes.gateway), ("containers", gateway))
        }
        for number in range(hop.WARM_UP + hop.BLOCKS):
            samples = texts(hop.BLOCK, seed=number)
            times = {name: await hop.block(samples, transport, url) for name, url in urls.items()}
            alone = [timed(together.embed, text) for text in samples]
            if number >= hop.WARM_UP:
                whole += alone
                for name, each in times.items():
                    split[name] += each
    overhead = {name: hop.quantiles([a - b for a, b in zip(each, whole, strict=True)]) for name, each in split.items()}
    return {
        "container_hop_ratio": overhead["containers"]["p50"] / overhead["processes"]["p50"],
        "container_hop": {**overhead, "one_process_s": quantile(whole, 0.5), "tasks": len(whole), "precision": precision},
    }


@asynccontextmanager
async def _containers(model: Path, precision: Precision) -> AsyncIterator[str]:
    """The same house in containers; the gateway's address."""
    exported = manifest.load(model)
    started: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            urls: dict[str, Sequence[str]] = {}
            for name in STAGES:
                own = precision if precision in exported.stage(name).files else "float32"
                command = ["--model", "/models", "--stage", name, "--replica", f"{name}-0", "--precision", own]
                urls[name] = [await _run(started, "stage", 8000, f"{model}:/models:ro", "--cpus", "1", command=command)]
            file = Path(scratch, "routes.json")
            routes.save(document(exported, urls, PIPELINES[:1]), file)
            command = ["--routes-file", "/routes.json"]
            gateway = await _run(started, "gateway", 8080, f"{file}:/routes.json:ro", command=command)
            await ready([gateway, *(url for each in urls.values() for url in each)])
            yield gateway
        finally:
            if started:
                await _docker("rm", "--force", *started)


async def _run(started: list[str], image: str, port: int, volume: str, *options: str, command: list[str]) -> str:
    arguments = ["run", "--detach", *HARDENED, "--volume", volume, *options, f"espalier/{image}:{TAG}"]
    container = await _docker(*arguments, "--host", "0.0.0.0", "--port", str(port), *command)
    started.append(container)
    address = await _docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", container)
    return f"http://{address}:{port}"


async def _docker(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec("docker", *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"docker {arguments[0]} failed")
    return output.decode().strip()
