"""A Docker engine for tests, and a stage image as small as one can be. Fixtures over this are in `tests.conftest`.

Where no engine answers, tests that need one are skipped; with `ESPALIER_REQUIRE_ENGINE=1` they fail.
"""

from __future__ import annotations

import io
import os
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import docker
import docker.errors
import docker.utils
import psutil
import pytest

FAKE_STAGE = Path(__file__).parent / "orchestrator" / "fake_stage.py"
DOCKERFILE = """\
FROM {base}
LABEL espalier.image=stage espalier.test={note}
COPY fake_stage.py /fake_stage.py
ENTRYPOINT ["python3.11", "/fake_stage.py"]
"""
PREFIX = "espalier-test-"


def own_name() -> str:
    """A name for something on the engine that no other run has, and by which `sweep` knows whose it was."""
    return f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"


def sweep(engine: docker.APIClient) -> None:
    """Remove what runs left that were killed before they could tidy up."""
    for container in engine.containers(all=True):
        if any(_is_left(name.lstrip("/")) for name in container["Names"]):
            engine.remove_container(container["Id"], force=True)
    for network in engine.networks():
        if _is_left(network["Name"]):
            engine.remove_network(network["Id"])
    for volume in engine.volumes()["Volumes"] or []:
        if _is_left(volume["Name"]):
            engine.remove_volume(volume["Name"])
    for tag in _tags(engine):
        if _is_left(tag.removeprefix("espalier-test/")):
            engine.remove_image(tag, force=True)


def _tags(engine: docker.APIClient) -> Iterator[str]:
    for image in engine.images():
        yield from image["RepoTags"] or []


def _is_left(name: str) -> bool:
    owner = name.removeprefix(PREFIX).partition("-")[0]
    return name.startswith(PREFIX) and owner.isdecimal() and not psutil.pid_exists(int(owner))


def connect() -> docker.APIClient:
    """The engine that `docker` would use; ends the test where none answers."""
    try:
        return docker.APIClient(**docker.utils.kwargs_from_env(), version="auto", timeout=60)
    except docker.errors.DockerException as error:
        problem = str(error)
    return give_up(f"no Docker engine answers: {problem}")


def give_up(reason: str) -> NoReturn:
    """End the test for want of an engine or an image: by a skip, or by a failure where they are required."""
    if os.environ.get("ESPALIER_REQUIRE_ENGINE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def build_fake_stage(engine: docker.APIClient, tag: str, note: str = "") -> str:
    """An image with `fake_stage.py` as its program; returns its id. Another note makes another image."""
    base = os.environ.get("BASE_IMAGE", "espalier/base:3.11")
    try:
        engine.inspect_image(base)
    except docker.errors.ImageNotFound:
        give_up(f"there is no image {base}: deploy/base-image.sh makes one, or name another by BASE_IMAGE")
    files = {"Dockerfile": DOCKERFILE.format(base=base, note=note or "none"), "fake_stage.py": FAKE_STAGE.read_text()}
    for line in engine.build(fileobj=_tar(files), custom_context=True, tag=tag, rm=True, decode=True):
        assert "error" not in line, line
    return str(engine.inspect_image(tag)["Id"])


def _tar(files: Mapping[str, str]) -> io.BytesIO:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    packed.seek(0)
    return packed
