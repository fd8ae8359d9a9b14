"""What runs for the whole folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.composed import Composed, composed
from tests.system.edge import Edge, running


@pytest.fixture(scope="package", params=["processes", "engine"])
def edge(request: pytest.FixtureRequest, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The testbed of edge.yaml, up in each runtime. A test begins with `edge.want`, whatever the one before did."""
    if request.param == "engine":
        request.getfixturevalue("images")
    home = tmp_path_factory.mktemp("edge")
    # Models of its own, for a test to add to; not copied, since they are large.
    shutil.copytree(minilm, home / "models" / minilm.name, copy_function=os.link)
    with running(Edge(home, home / "models", request.param)) as edge:
        yield edge


@pytest.fixture(scope="package")
def project(images: None) -> Iterator[Composed]:
    """The project of docker-compose.yml, up."""
    with composed() as project:
        yield project
