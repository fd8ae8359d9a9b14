"""A real Prometheus server for tests, and its `promtool`.

They are taken from PATH, or else out of the distribution's package, which is unpacked under `out/tools` and not installed.
Where neither works a test is skipped; with `ESPALIER_REQUIRE_ENGINE=1` it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RULES = ROOT / "deploy" / "prometheus" / "rules"
TOOLS = ROOT / "out" / "tools"
START_LIMIT_S = 20.0
POLL_S = 0.02


@functools.cache
def tool(name: str) -> Path:
    """Path of `prometheus` or `promtool`; ends the test where there is none."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    unpacked = TOOLS / "prometheus" / "usr" / "bin" / name
    problem = "" if unpacked.exists() else _unpack()
    if unpacked.exists():
        return unpacked
    reason = f"there is no {name}: {problem}; install the package prometheus"
    if os.environ.get("ESPALIER_REQUIRE_ENGINE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _unpack() -> str:
    """Unpack the package; returns what went wrong."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as directory:
        problem = _run(["apt-get", "download", "prometheus"], directory)
        if problem and not _run(["apt-get", "update"], directory):
            problem = _run(["apt-get", "download", "prometheus"], directory)
        package = next(Path(directory).glob("prometheus_*.deb"), None)
        if package is None:
            return problem or "apt-get downloaded nothing"
        problem = _run(["dpkg", "-x", str(package), "unpacked"], directory)
        # In one step, so that tests that run beside this one never see half of it.
        if not problem and not (TOOLS / "prometheus").exists():
            (Path(directory) / "unpacked").rename(TOOLS / "prometheus")
        return problem


def _run(command: Sequence[str], directory: str) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=50, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it failed"])[-1]


def promtool(*arguments: str, stdin: bytes = b"") -> None:
    """Run promtool; fails the test with what it says if it finds anything."""
    done = subprocess.run([tool("promtool"), *arguments], input=stdin, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


class Server:
    """A server with the configuration of the deployment, but for the addresses. Started and killed as often as a test likes."""

    def __init__(self, directory: Path, orchestrator_url: str) -> None:
        self._directory = directory
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._process: subprocess.Popen[bytes] | None = None
        text = CONFIGURATION.read_text().replace("/etc/prometheus/rules", str(RULES))
        for deployed, here in (("orchestrator:8090", orchestrator_url), ("localhost:9090", self.url)):
            assert deployed in text
            text = text.replace(deployed, here.removeprefix("http://"))
        (directory / "prometheus.yml").write_text(text)
        self._log = directory / "prometheus.log"

    def start(self) -> None:
        """Start it on the data it left."""
        arguments = (
            f"--config.file={self._directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self._directory / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([tool("prometheus"), *arguments], stdout=log, stderr=log)

    async def ready(self) -> None:
        """Wait until it answers queries."""
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(START_LIMIT_S):
            while True:
                assert self._process is not None, "it was not started"
                assert self._process.poll() is None, self._log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{self.url}/-/ready")).status_code == 200:
                        return
                await asyncio.sleep(POLL_S)

    def kill(self) -> None:
        """End it without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
