"""What sharing stages saves, or costs, in memory: a testbed's services, each once, against one process per kind of task.

Every process is warm and idle. Proportional set sizes: pages that several processes map, of one file of weights, say, count
once in all. A process costs some 40 MB before it holds anything: many small stages take more than a few monoliths, and large
shared ones less. `python -m tests.bench.memory TESTBED [MODELS_DIR]` measures one testbed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from orchestrator import testbed as testbeds
from orchestrator.testbed import ServiceSection, Testbed
from tests.bench import house

COMPARED = ("demo", "images")
"""Small models in many stages, and a large one that is shared."""
TESTBEDS = Path(__file__).parents[2] / "deploy" / "testbeds"


async def measure(models: Path) -> dict[str, Any]:
    """`memory`: by testbed the ratio of shared stages to monoliths, and how it came about; see `compare`."""
    return {"memory": {name: await compare(TESTBEDS / f"{name}.yaml", models) for name in COMPARED}}


async def compare(path: Path, models: Path) -> dict[str, Any]:
    """Memory of a testbed's stages, shared and in monoliths [bytes].

    Returns:
        `ratio`, shared over monoliths; `ratio_of_stages`, the same beyond what an empty process holds; `shared` by service and
        `monoliths` by pipeline, [bytes]; `bare_process` [bytes].
    """
    testbed = testbeds.load(path).testbed
    async with shared(testbed, models) as processes:
        apart = {name: _pss(process) for name, process in processes.items()}
    async with monoliths(testbed, models) as processes:
        whole = {name: _pss(process) for name, process in processes.items()}
    async with bare() as process:
        empty = _pss(process)
    return {
        "ratio": ratio(apart, whole, 0), "ratio_of_stages": ratio(apart, whole, empty), "shared": apart, "monoliths": whole,
        "bare_process": empty,
    }  # fmt: skip


def ratio(shared: Mapping[str, int], monoliths: Mapping[str, int], bare: int) -> float:
    """Memory of the shared processes over that of the monoliths, each less that of a process that holds nothing."""
    return (sum(shared.values()) - len(shared) * bare) / (sum(monoliths.values()) - len(monoliths) * bare)


@asynccontextmanager
async def shared(testbed: Testbed, models: Path) -> AsyncIterator[dict[str, psutil.Process]]:
    """One replica of every service that a pipeline visits, and a gateway."""
    used = {step.service for pipeline in testbed.pipelines.values() for step in pipeline.steps}
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes, urls = {}, []
        for name in used:
            section = testbed.services[name]
            words = ["--model", str(models / section.model), "--stage", ",".join(section.members)]
            process, url = await house.start(
                "services.stage", *words, "--service", name, "--precision", section.precision, "--cpus", "1", log=scratch / name
            )  # fmt: skip
            stack.push_async_callback(_end, process)
            processes[name] = psutil.Process(process.pid)
            urls.append(url)
        process, _ = await house.start("services.gateway", "--routes-file", str(scratch / "none"), log=scratch / "gateway")
        stack.push_async_callback(_end, process)
        await house.ready(urls)
        yield {**processes, "gateway": psutil.Process(process.pid)}


@asynccontextmanager
async def monoliths(testbed: Testbed, models: Path) -> AsyncIterator[dict[str, psutil.Process]]:
    """One process per pipeline, with every stage it visits."""
    async with AsyncExitStack() as stack:
        processes = {}
        for name, pipeline in testbed.pipelines.items():
            visited = dict.fromkeys(step.service for step in pipeline.steps)
            parts = [_part(testbed.services[service], models) for service in visited]
            processes[name] = await stack.enter_async_context(_said_ready(parts))
        yield processes


@asynccontextmanager
async def bare() -> AsyncIterator[psutil.Process]:
    """A process that holds no stage."""
    async with _said_ready([]) as process:
        yield process


def _part(section: ServiceSection, models: Path) -> str:
    return f"{models / section.model}:{section.precision}:{','.join(section.members)}"


@asynccontextmanager
async def _said_ready(parts: Sequence[str]) -> AsyncIterator[psutil.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.monolith", *parts, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )  # fmt: skip
    try:
        if process.stdout is None or (await process.stdout.readline()).strip() != b"ready":
            raise RuntimeError(f"a process with {', '.join(parts) or 'nothing'} did not come up")
        yield psutil.Process(process.pid)
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    await process.wait()


def main() -> None:
    """Compare one testbed, and print the result."""
    testbed, models = Path(sys.argv[1]), Path(*sys.argv[2:] or ["out/models"])
    print(json.dumps(asyncio.run(compare(testbed, models)), indent=2))


def _pss(process: psutil.Process) -> int:
    return int(process.memory_full_info().pss)


if __name__ == "__main__":
    main()
