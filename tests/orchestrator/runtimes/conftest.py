"""All drivers, for tests that must hold for each."""

from __future__ import annotations

from collections.abc import Iterator

import docker
import pytest

from tests.engine import own_name
from tests.orchestrator.runtimes.world import EngineKind, Kind, ProcessesKind, SwarmKind


@pytest.fixture(scope="session")
def stage_network(engine: docker.APIClient) -> Iterator[str]:
    """A network for stages."""
    name = own_name()
    engine.create_network(name, driver="bridge")
    yield name
    engine.remove_network(name)


@pytest.fixture(scope="session")
def stage_models(engine: docker.APIClient) -> Iterator[str]:
    """A volume for models; fake stages do not open it."""
    name = own_name()
    engine.create_volume(name)
    yield name
    engine.remove_volume(name)


@pytest.fixture
def containers(engine: docker.APIClient, fake_stage_image: str, stage_network: str, stage_models: str) -> Iterator[EngineKind]:
    """The engine driver, in a scope of its own."""
    kind = EngineKind(engine, fake_stage_image, stage_network, stage_models)
    yield kind
    kind.remove_all()


@pytest.fixture
def swarm() -> Iterator[SwarmKind]:
    """The swarm driver, over a manager that is a fake."""
    kind = SwarmKind()
    yield kind
    kind.manager.end_all()


@pytest.fixture(params=["processes", "engine", "swarm"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each driver in turn."""
    if request.param == "processes":
        return ProcessesKind()
    if request.param == "swarm":
        over_swarm: SwarmKind = request.getfixturevalue("swarm")
        return over_swarm
    made: EngineKind = request.getfixturevalue("containers")
    return made
