"""Stages and a gateway as processes of their own, wired by a routes file: the data plane alone, without an orchestrator."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from models import manifest
from models.manifest import Manifest
from services.dataplane import routes
from services.dataplane.pipeline import Pipeline
from services.dataplane.routes import Replica, Routes, Service
from services.transport import Transport, Unreachable

READY_S = 60.0


@dataclass(frozen=True, slots=True)
class House:
    """Addresses and processes of what runs."""

    gateway: str
    stages: Mapping[str, str]
    """First replica of each service."""
    processes: Mapping[str, psutil.Process]
    """`gateway`, and SERVICE-INDEX of each replica."""


@asynccontextmanager
async def house(
    model: Path, replicas: Mapping[str, int], pipelines: Sequence[Pipeline], *, precision: str = "float32"
) -> AsyncIterator[House]:
    """Start every replica and a gateway, wait until they are ready, and drain them on the way out."""
    exported = manifest.load(model)
    started: dict[str, asyncio.subprocess.Process] = {}
    urls: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name, count in replicas.items():
                spec = exported.stage(name)
                urls[name] = []
                for index in range(count):
                    own = precision if precision in spec.files else "float32"
                    replica = f"{name}-{index}"
                    command = ["services.stage", "--model", str(model), "--stage", name, "--replica", replica]
                    process, url = await start(
                        *command, "--precision", own, "--cpus", "1", log=Path(scratch, f"{name}-{index}")
                    )
                    started[replica] = process
                    urls[name].append(url)
            file = Path(scratch, "routes.json")
            routes.save(document(exported, urls, pipelines), file)
            process, gateway = await start("services.gateway", "--routes-file", str(file), log=Path(scratch, "gateway"))
            started["gateway"] = process
            # A gateway without pipelines is never ready.
            await ready([*([gateway] if pipelines else []), *(url for each in urls.values() for url in each)])
            yield House(
                gateway,
                {name: each[0] for name, each in urls.items()},
                {name: psutil.Process(process.pid) for name, process in started.items()},
            )
        finally:
            for process in started.values():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            await asyncio.gather(*(process.wait() for process in started.values()))


def document(exported: Manifest, urls: Mapping[str, Sequence[str]], pipelines: Sequence[Pipeline]) -> Routes:
    """Routes to replicas of the stages at these addresses, all of them ready."""
    services = {}
    for name, addresses in urls.items():
        spec = exported.stage(name)
        services[name] = Service(
            name=name,
            model=exported.model,
            stage=name,
            tier=spec.tier,
            inputs=spec.inputs,
            outputs=spec.outputs,
            replicas=tuple(
                Replica(id=f"{name}-{index}", node="local", url=url, state="ready") for index, url in enumerate(addresses)
            ),
        )
    return Routes(version=1, testbed="bench", services=services, pipelines={p.name: p for p in pipelines})


async def start(*command: str, log: Path) -> tuple[asyncio.subprocess.Process, str]:
    """A server of ours as a process on a free port, and its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        fd = listener.fileno()
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *command, "--fd", str(fd), pass_fds=[fd], stdout=output, stderr=output
            )
        return process, f"http://127.0.0.1:{listener.getsockname()[1]}"


async def ready(addresses: Sequence[str]) -> None:
    """Wait until all of them are ready."""
    async with asyncio.timeout(READY_S), Transport() as transport:
        for address in addresses:
            while True:
                with contextlib.suppress(Unreachable):
                    if (await transport.get(f"{address}/v2/health/ready", READY_S)).status == 200:
                        break
                await asyncio.sleep(0.05)


def cpu_s(process: psutil.Process) -> float:
    """Processor time the process has used [s]."""
    times = process.cpu_times()
    return float(times.user + times.system)
