"""The set-up scripts where they have nothing to do or refuse, and the health check against a real server."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in [*(ROOT / "deploy").rglob("*.sh"), ROOT / "deploy" / "local-boxes"])
BAD_USAGE = 2


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of deploy/."""
    return subprocess.run(
        [ROOT / "deploy" / script, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_scripts_parse_and_stop_at_errors(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert "\nset -euo pipefail\n" in (ROOT / path).read_text()
    assert os.access(ROOT / path, os.X_OK)


@pytest.mark.parametrize(("script", "word"), [("base-image.sh", "no arguments"), ("install-engine.sh", "unknown argument")])
def test_an_unknown_argument_is_refused(script: str, word: str) -> None:
    done = run(script, "surprise")
    assert done.returncode == BAD_USAGE
    assert word in done.stderr


def test_the_base_image_says_what_it_needs(tmp_path: Path) -> None:
    done = run("base-image.sh", DOCKER_HOST=f"unix://{tmp_path}/nobody.sock")
    assert done.returncode == BAD_USAGE
    assert "install-engine.sh" in done.stderr


@pytest.mark.parametrize("pid", [None, os.getpid(), 0], ids=["no file", "another program", "no process"])
def test_only_an_engine_that_the_script_started_is_stopped(tmp_path: Path, pid: int | None) -> None:
    if pid is not None:
        (tmp_path / "dockerd.pid").write_text(str(pid))
    done = run("install-engine.sh", "stop", ESPALIER_ENGINE_DIR=str(tmp_path))
    assert done.returncode == BAD_USAGE
    assert "nothing is stopped" in done.stderr


class Page(BaseHTTPRequestHandler):
    """200 under /ready, 503 elsewhere."""

    def do_GET(self) -> None:
        self.send_response(HTTPStatus.OK if self.path == "/ready" else HTTPStatus.SERVICE_UNAVAILABLE)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Tests are quiet."""


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_health_check_wants_200(port: int) -> None:
    assert run("images/healthcheck.sh", str(port), "/ready").returncode == 0
    assert run("images/healthcheck.sh", str(port), "/other").returncode != 0


def test_the_health_check_sees_a_closed_port() -> None:
    with HTTPServer(("127.0.0.1", 0), Page) as closed:
        pass
    assert run("images/healthcheck.sh", str(closed.server_port), "/ready").returncode != 0
