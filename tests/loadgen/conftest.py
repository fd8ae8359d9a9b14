from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.loadgen.server import Server, serve


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    async with serve() as server:
        yield server
