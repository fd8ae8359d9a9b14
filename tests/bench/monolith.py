"""One process that holds all stages of a task, warm, as a server of that task alone would: what sharing is compared with.

`python -m tests.bench.monolith MODEL_DIR:PRECISION:STAGE[,STAGE...] ...`; it says `ready`, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import get_args

from models import manifest
from models.manifest import Precision
from services import server  # noqa: F401  what every server has loaded
from services.stage.app import Replica
from services.stage.onward import Identity
from services.stage.processors.fused import open_stages


async def main(parts: list[str]) -> None:
    """Open and warm every part, and wait."""
    async with AsyncExitStack() as stack:
        for part in parts:
            directory, precision, names = part.rsplit(":", 2)
            own: Precision = next(each for each in get_args(Precision) if each == precision)
            model = manifest.load(Path(directory))
            spec, processor = open_stages(model, names.split(","), own, Path(directory), threads=1)
            await stack.enter_async_context(Replica(model, spec, processor, Identity(names, names, "local")).running())
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
