"""What several folders' tests share."""

from __future__ import annotations

import os
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
EXPORTS = ROOT / "out" / "models"
"""Where `make demo` puts them too, so one export serves both."""


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, exported in both precisions by the command a user would give."""
    return exported("minilm", "float32", "int8")


@pytest.fixture(scope="session")
def lm_ci() -> Path:
    """The seeded language model, exported in every precision."""
    return exported("lm-ci", "float32", "float16", "int8")


@pytest.fixture(scope="session")
def lm_cut() -> dict[int, Path]:
    """The same language model with its decoder cut, by the number of parts."""
    return {parts: exported("lm-ci", "float32", parts=parts) for parts in (2, 3)}


@pytest.fixture(scope="session")
def asr_ci() -> Path:
    """The seeded speech model, exported."""
    return exported("asr-ci", "float32")


@pytest.fixture(scope="session")
def vlm_ci() -> Path:
    """The seeded vision-language model, exported."""
    return exported("vlm-ci", "float32")


def exported(name: str, *precisions: str, parts: int = 1) -> Path:
    """The export of a model of the catalogue, made where it is missing or stale."""
    directory = EXPORTS / (name if parts == 1 else f"{name}-cut-{parts}")
    wanted = [word for precision in precisions for word in ("--precision", precision)]
    wanted += ["--cut", str(parts)] if parts > 1 else []
    command = [sys.executable, "-m", "models", "export", name, "--out", str(directory), *wanted]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return directory


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
    tag = f"espalier-test/fake-stage:{os.getpid()}"  # its own: another run on this engine removes its own image
    build_fake_stage(engine, tag)
    yield tag
    engine.remove_image(tag, force=True)
