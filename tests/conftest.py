"""What several folders' tests share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
from hypothesis import settings

from tests.engine import build_fake_stage, connect, give_up, sweep

# An example that takes long on a busy machine is no finding.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

ROOT = Path(__file__).parents[1]
MINILM = ROOT / "out" / "models" / "minilm"
"""Where `make demo` puts it too, so one export serves both."""


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, exported in both precisions by the command a user would give."""
    command = [sys.executable, "-m", "models", "export", "minilm", "--out", str(MINILM)]
    done = subprocess.run(
        [*command, "--precision", "float32", "--precision", "int8"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return MINILM


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.APIClient]:
    """The Docker engine of this machine; see `tests.engine` for what happens where there is none."""
    client = connect()
    sweep(client)
    yield client
    client.close()


@pytest.fixture(scope="session")
def images(engine: docker.APIClient) -> None:
    """All images of docker-compose.yml, of the sources as they are. The first build takes minutes, so `make test` does it."""
    command = ["docker", "compose", "--progress", "plain", "--profile", "load", "build"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    except subprocess.TimeoutExpired:
        give_up(f"the images are not there yet: {' '.join(command)} (make test does it)")
    if done.returncode:
        give_up(f"the images cannot be built:\n{done.stderr[-2000:]}")


@pytest.fixture(scope="session")
def fake_stage_image(engine: docker.APIClient) -> Iterator[str]:
    """Tag of an image whose program is `tests.orchestrator.fake_stage`: it starts in half a second."""
    tag = "espalier-test/fake-stage:1"
    build_fake_stage(engine, tag)
    yield tag
    engine.remove_image(tag, force=True)
