from __future__ import annotations

import hashlib
import inspect
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import docker
import docker.errors
import pytest
import requests.exceptions

from orchestrator.errors import SetupFailed
from orchestrator.runtimes.driver import Unreachable
from orchestrator.runtimes.engine_api import EngineApi, Refused, settings, version_key


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


class TestWhichEngine:
    """As `docker` itself finds it."""

    @pytest.fixture(autouse=True)
    def configuration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    def context(self, home: Path, name: str, host: str) -> None:
        place = home / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest()
        place.mkdir(parents=True)
        endpoints = {"docker": {"Host": host, "SkipTLSVerify": False}}
        (place / "meta.json").write_text(json.dumps({"Name": name, "Metadata": {}, "Endpoints": endpoints}))

    def certificates(self, place: Path) -> None:
        place.mkdir(parents=True)
        for name in ("ca.pem", "cert.pem", "key.pem"):
            (place / name).write_text("")

    def test_where_nothing_is_said_it_is_the_socket_of_this_machine(self) -> None:
        assert settings({}) == {}

    def test_the_host_of_the_environment_comes_before_a_context(self, configuration: Path) -> None:
        self.context(configuration, "far", "tcp://far:2376")
        found = settings({"DOCKER_HOST": "tcp://near:2375", "DOCKER_CONTEXT": "far"})
        assert found == {"base_url": "tcp://near:2375"}

    def test_a_context_by_ssh_is_taken_as_it_is(self, configuration: Path) -> None:
        self.context(configuration, "far", "ssh://user@far")
        assert settings({"DOCKER_CONTEXT": "far"}) == {"base_url": "ssh://user@far"}

    def test_the_context_in_use_brings_its_certificates(self, configuration: Path) -> None:
        self.context(configuration, "far", "tcp://far:2376")
        self.certificates(configuration / "contexts" / "tls" / hashlib.sha256(b"far").hexdigest() / "docker")
        (configuration / "config.json").write_text('{"currentContext": "far"}')
        found = settings({})
        assert found["base_url"] == "tcp://far:2376"
        assert (found["tls"].verify, found["tls"].cert[0][-8:], found["tls"].ca_cert[-6:]) == (True, "cert.pem", "ca.pem")

    def test_what_is_not_there_is_named(self, configuration: Path) -> None:
        with pytest.raises(SetupFailed, match="there is no Docker context far"):
            settings({"DOCKER_CONTEXT": "far"})
        with pytest.raises(SetupFailed, match="cannot be used"):
            settings({"DOCKER_HOST": "tcp://far:2376", "DOCKER_CERT_PATH": "/nobody"})
