"""One running testbed for the whole folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.edge import Edge, running


@pytest.fixture(scope="package")
def edge(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """The testbed of edge.yaml, up. A test begins with `edge.want`, whatever the one before did."""
    yield from running(tmp_path_factory.mktemp("edge"), minilm.parent)
