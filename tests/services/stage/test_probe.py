from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import orjson
import pytest

from services.stage import probe
from services.transport import HttpAnswer, Transport
from tests.services import harness
from tests.services.harness import Doubler, replica

DELAY_S, BANDWIDTH = 0.02, 4e6
"""One way [s], and of the way there [bytes/s], of the artificial link."""


@asynccontextmanager
async def slow_link(url: str, delay_s: float = DELAY_S, bandwidth: float = BANDWIDTH) -> AsyncIterator[str]:
    """A proxy that holds every piece back by the delay, either way, and lets only so many bytes a second through."""
    place = urlsplit(url)

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pieces leave in order, each when the link has carried it, whatever comes in meanwhile."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, piece = await pieces.get()
                await asyncio.sleep(due - loop.time())
                writer.write(piece)

        delivering = asyncio.ensure_future(deliver())
        free = loop.time()
        while piece := await reader.read(1 << 16):
            free = max(free, loop.time()) + len(piece) / bandwidth
            pieces.put_nowait((free + delay_s, piece))
        delivering.cancel()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        beyond_reader, beyond_writer = await asyncio.open_connection(place.hostname, place.port)
        await asyncio.gather(carry(reader, beyond_writer), carry(beyond_reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def ask(at: str, body: object, path: str = probe.PATH) -> HttpAnswer:
    async with Transport() as transport:
        sent = body if isinstance(body, bytes) else orjson.dumps(body)
        return await transport.post(f"{at}{path}", sent, {"content-type": "application/json"}, 30.0)


async def test_a_slow_link_is_measured_as_slow_as_it_is() -> None:
    async with harness.stages(replica(Doubler()), replica(Doubler())) as [here, there], slow_link(there) as far:
        answer = await ask(here, {"url": far, "own": here})
        found = probe.Measured.model_validate_json(answer.body)
        # Never less than the link: only the machine can add to it.
        assert DELAY_S * 0.9 <= found.latency_s <= DELAY_S * 3
        assert BANDWIDTH / 3 <= found.bandwidth_bytes_per_s <= BANDWIDTH * 1.1
        near = probe.Measured.model_validate_json((await ask(here, {"url": there, "own": here})).body)
        assert near.latency_s < DELAY_S / 2
        assert near.bandwidth_bytes_per_s > found.bandwidth_bytes_per_s


async def test_one_measurement_at_a_time() -> None:
    async with harness.stages(replica(Doubler()), replica(Doubler())) as [here, there], slow_link(there, 0.2) as far:
        first = asyncio.ensure_future(ask(here, {"url": far, "own": here}))
        await asyncio.sleep(0.05)
        second = await ask(here, {"url": there, "own": here})
        assert (second.status, harness.reason(second)) == (429, "queue_full")
        assert (await first).status == 200


async def test_a_stage_that_is_not_there_is_told() -> None:
    async with harness.stages(replica(Doubler())) as [here]:
        answer = await ask(here, {"url": "http://127.0.0.1:9", "own": here})
        assert (answer.status, harness.reason(answer)) == (502, "upstream_error")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1/v1/shutdown", "http://a b", "https://a"])
async def test_nothing_but_a_stage_can_be_asked(url: str) -> None:
    async with harness.stages(replica(Doubler())) as [here]:
        assert (await ask(here, {"url": url, "own": here})).status == 400


async def test_a_body_has_its_limit() -> None:
    async with harness.stages(replica(Doubler())) as [here]:
        answer = await ask(here, bytes(1000), probe.DISCARD)
        assert orjson.loads(answer.body) == {"bytes": 1000}
        assert (await ask(here, bytes(probe.MOST_BYTES + 1), probe.DISCARD)).status == 413
