from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.orchestrator.telemetry import pages as endpoints
from tests.orchestrator.telemetry.pages import Page


@pytest.fixture
def pages() -> Iterator[list[Page]]:
    with endpoints.serving(3) as found:
        yield found


@pytest.fixture
def undiscovered() -> Iterator[Page]:
    with endpoints.serving(1) as found:
        yield found[0]
