from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator import given_gateway
from orchestrator.given_gateway import GivenGateway

LIMIT_S = 10.0


class Peer(ThreadingHTTPServer):
    """A gateway whose readiness a test sets."""

    status = 503

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Peer

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def listening() -> Iterator[Peer]:
    with Peer(("127.0.0.1", 0), Answers) as peer:
        thread = threading.Thread(target=peer.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield peer
        finally:
            peer.shutdown()
            thread.join()


async def until_state(gateway: GivenGateway, state: str) -> None:
    async with asyncio.timeout(LIMIT_S):
        while gateway.record.state != state:
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_gateway, "POLL_S", 0.01)
    monkeypatch.setattr(given_gateway, "PAUSE_S", 0.01)


async def test_its_readiness_is_followed() -> None:
    with listening() as peer:
        gateway = GivenGateway(f"{peer.url}/")
        assert (gateway.record.url, gateway.record.pid) == (peer.url, None)
        await gateway.open()
        peer.status = 200
        await until_state(gateway, "ready")
        peer.status = 503
        await until_state(gateway, "starting")
        await gateway.close()


async def test_one_that_listens_is_there_ready_or_not() -> None:
    with listening() as peer:
        gateway = GivenGateway(peer.url)
        assert await gateway.is_there()
        await gateway.leave()


async def test_one_whose_address_answers_nobody_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    gateway = GivenGateway(f"http://127.0.0.1:{port}")
    assert not await gateway.is_there()
    await gateway.leave()


async def test_one_whose_name_is_unknown_is_gone() -> None:
    gateway = GivenGateway("http://gateway.invalid:8080")
    assert not await gateway.is_there()
    await gateway.leave()
