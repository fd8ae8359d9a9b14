from __future__ import annotations

import inspect
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import docker
import docker.errors
import pytest
import requests.exceptions

from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.engine_api import EngineApi, Refused, version_key


@pytest.fixture
def silent(tmp_path: Path) -> EngineApi:
    return EngineApi(f"unix://{tmp_path}/nobody.sock")


def answering(status: int, body: bytes) -> ThreadingHTTPServer:
    """An HTTP server with one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


async def test_an_engine_that_is_not_there_is_unreachable_and_named(silent: EngineApi) -> None:
    with pytest.raises(Unreachable, match=r"the engine at unix://.*/nobody\.sock does not answer: No such file or directory"):
        await silent.connect()
    silent.close()


@pytest.mark.parametrize("status", [502, 503, 504])
async def test_a_proxy_without_an_engine_behind_it_is_an_engine_that_does_not_answer(status: int) -> None:
    with answering(status, b"gone") as server:
        api = EngineApi(f"tcp://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(Unreachable, match="does not answer: gone"):
            await api.inspect("x")
        api.close()
        server.shutdown()


async def test_no_is_an_answer() -> None:
    with answering(403, b'{"message": "not through this proxy"}') as server:
        api = EngineApi(f"tcp://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(Refused, match="not through this proxy") as refused:
            await api.has_network("x")
        assert refused.value.status == 403
        api.close()
        server.shutdown()


async def test_nonsense_is_no_answer() -> None:
    with answering(200, b"<html>") as server:
        api = EngineApi(f"tcp://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(Unreachable):
            await api.connect()
        api.close()
        server.shutdown()


def _errors(module: Any) -> list[type[Exception]]:
    """Those it defines, but for warnings."""
    kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
    return [kind for kind in kinds if issubclass(kind, Exception) and not issubclass(kind, Warning)]


@pytest.mark.parametrize("kind", [*_errors(docker.errors), *_errors(requests.exceptions)], ids=lambda kind: kind.__name__)
def test_every_error_of_the_package_is_translated(kind: type[Exception]) -> None:
    """So that a version with a new one is noticed."""
    if kind is docker.errors.StreamParseError:
        return  # met only by the thread of an event stream, which it ends as anything else does
    assert issubclass(kind, OSError | docker.errors.DockerException), kind


async def test_what_is_missing_is_none(engine: docker.APIClient) -> None:
    api = EngineApi()
    assert version_key(await api.connect()) >= (1, 41)
    assert await api.image("espalier-test/nobody:made") is None
    assert not await api.has_network("espalier-test-nobody-made")
    assert not await api.has_volume("espalier-test-nobody-made")
    api.close()


def test_versions_are_compared_as_numbers() -> None:
    assert version_key("1.9") < version_key("1.41") < version_key("1.100")
    assert max("1.9", "1.41", key=version_key) == "1.41"
