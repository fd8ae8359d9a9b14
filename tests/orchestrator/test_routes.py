from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from models.manifest import Manifest
from orchestrator import wiring
from orchestrator.core import Replica
from orchestrator.routes import GATEWAY_FORGOTTEN_S, Caller, Map, Publisher
from services.dataplane import routes as document
from services.dataplane.routes import Link, ReplicaState
from tests.orchestrator.examples import MANIFEST, load


def plan(manifest: Manifest = MANIFEST) -> Map:
    testbed = load().testbed
    return Map(testbed, {"tiny": manifest}, wiring.wire(testbed, {"tiny": manifest}).pipelines)


def replica(id: str = "encode-1", state: ReplicaState = "ready") -> Replica:
    return Replica(id, "encode", "edge-1", state, 0.5, 1, url="http://127.0.0.1:1")


class Clock:
    t = 0.0

    def __call__(self) -> float:
        return self.t


def test_the_document_has_all_that_a_gateway_needs() -> None:
    routes = plan().routes([replica(), replica("encode-2", "standby")], 7)
    assert (routes.version, routes.testbed) == (7, "small")
    encode = routes.services["encode"]
    assert (encode.tier, encode.stage, encode.model) == ("core", "encode", "tiny")
    assert [(r.id, r.state) for r in encode.replicas] == [("encode-1", "ready"), ("encode-2", "standby")]
    assert routes.services["pool"].replicas == ()
    link = Link(latency_s=0.001, bandwidth_bytes_per_s=125e6)
    assert routes.links == {"edge-1": {"edge-2": link}, "edge-2": {"edge-1": link}}
    assert routes.pipelines["embed"].epsilon == 0.05


def test_when_standbys_are_let_out_is_part_of_the_document(tmp_path: Path) -> None:
    publisher = Publisher(plan(), tmp_path / "routes.json")
    assert publisher.publish([replica()]) == 1
    assert publisher.current.services["encode"].allowance == 0
    assert publisher.publish([replica()], {"encode": 2}) == 2
    assert (publisher.current.services["encode"].allowance, publisher.current.services["pool"].allowance) == (2, 0)
    assert publisher.publish([replica()], {"encode": 2}) == 2
    assert publisher.publish([replica()], {"encode": 2}, {"encode": 1.0}) == 3
    assert (publisher.current.services["encode"].patience, publisher.current.services["pool"].patience) == (1.0, 0.25)


def test_the_version_grows_with_every_change_only_and_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "routes.json"
    publisher = Publisher(plan(), path)
    assert [publisher.publish([replica()]), publisher.publish([replica()]), publisher.publish([replica(state="draining")])] == [
        1,
        1,
        2,
    ]
    successor = Publisher(plan(), path)
    assert successor.publish([replica(state="draining")]) == 2, "found as it was left"
    assert successor.publish([]) == 3
    kept = document.load(path)
    assert kept is not None
    assert kept.version == 3


def test_routes_are_published_even_if_they_cannot_be_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    publisher = Publisher(plan(), tmp_path / "file" / "routes.json")
    assert [publisher.publish([]), publisher.publish([replica()])] == [1, 2]
    assert "routes 2 could not be kept on disk" in caplog.text


async def test_a_poll_is_answered_as_soon_as_there_is_news(tmp_path: Path) -> None:
    publisher = Publisher(plan(), tmp_path / "routes.json")
    publisher.publish([])
    poll = asyncio.create_task(publisher.wait_for_news(1, 10.0, Caller("g")))
    await asyncio.sleep(0)
    publisher.publish([replica()])
    found = await asyncio.wait_for(poll, 1)
    assert found is not None
    assert found.version == 2
    assert await publisher.wait_for_news(1, 10.0, Caller("g")) == found
    assert await publisher.wait_for_news(2, 0.01, Caller("g")) is None


async def test_a_gateway_that_knows_more_than_we_do_is_overtaken(tmp_path: Path) -> None:
    """The state directory was lost: the versions start again, and the gateway would take the next one for old."""
    publisher = Publisher(plan(), tmp_path / "routes.json")
    publisher.publish([])
    found = await publisher.wait_for_news(41, 1.0, Caller("g"))
    assert found is not None
    assert found.version == 42
    assert publisher.publish([replica()]) == 43


async def test_a_drain_waits_for_every_gateway_that_is_heard_of(tmp_path: Path) -> None:
    publisher = Publisher(plan(), tmp_path / "routes.json")
    version = publisher.publish([replica()])
    assert await publisher.acknowledged(version, 0.01), "there is no gateway"
    polls = [asyncio.create_task(publisher.wait_for_news(version, 10.0, Caller(name))) for name in ("g", "h")]
    await asyncio.sleep(0)
    version = publisher.publish([replica(state="draining")])
    await asyncio.gather(*polls)
    assert not await publisher.acknowledged(version, 0.01)
    waiting = asyncio.create_task(publisher.acknowledged(version, 10.0))
    following = [asyncio.create_task(publisher.wait_for_news(version, 10.0, Caller(name))) for name in ("g", "h")]
    assert await asyncio.wait_for(waiting, 1)
    publisher.close()
    assert await asyncio.gather(*following) == [None, None]


async def test_nobody_waits_for_a_gateway_that_is_gone(tmp_path: Path) -> None:
    clock = Clock()
    publisher = Publisher(plan(), tmp_path / "routes.json", clock)
    publisher.publish([])
    for name in ("silent", "dead"):
        assert await publisher.wait_for_news(0, 1.0, Caller(name)) is not None
    version = publisher.publish([replica()])
    publisher.forget("dead")
    assert not await publisher.acknowledged(version, 0.01)
    clock.t += GATEWAY_FORGOTTEN_S + 0.1
    assert await publisher.acknowledged(version, 0.01)


async def test_gateways_that_ask_are_known_by_where_they_are(tmp_path: Path) -> None:
    clock = Clock()
    publisher = Publisher(plan(), tmp_path / "routes.json", clock)
    publisher.publish([])
    first, second = Caller("g", "edge-1", "http://127.0.0.1:1"), Caller("g", "edge-2", "http://127.0.0.1:2")
    for caller in (first, second):
        await publisher.wait_for_news(1, 0.0, caller)
    assert publisher.heard() == {first: 1, second: 1}
    publisher.drop(first)
    assert publisher.heard() == {second: 1}
    await publisher.wait_for_news(1, 0.0, first)
    clock.t += GATEWAY_FORGOTTEN_S + 0.1
    await publisher.wait_for_news(1, 0.0, second)
    assert publisher.heard() == {second: 1}
