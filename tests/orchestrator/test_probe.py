from __future__ import annotations

import httpx
import pytest

from orchestrator import probe
from orchestrator.core import Replica
from orchestrator.errors import Conflict, RunFailed
from orchestrator.testbed import parse
from services.dataplane.routes import Link, ReplicaState
from tests.orchestrator.examples import TESTBED, load

MEASURED = {("edge-2", "edge-1"): Link(latency_s=0.0123456, bandwidth_bytes_per_s=5e6)}
TIERS = {"tokenise": "light", "encode": "core"}


def replica(service: str, number: int, state: ReplicaState) -> Replica:
    return Replica(f"{service}-{number}", service, "edge-1", state, 0.1, 1, url=f"http://{service}-{number}:8000")


@pytest.mark.parametrize(
    ("replicas", "chosen"),
    [
        ([("encode", "ready"), ("tokenise", "ready"), ("encode", "standby")], "encode-2"),
        ([("encode", "ready"), ("tokenise", "ready"), ("tokenise", "starting")], "tokenise-1"),
        ([("encode", "ready"), ("tokenise", "draining")], "encode-0"),
    ],
)
def test_the_replica_that_is_disturbed_least_measures(replicas: list[tuple[str, ReplicaState]], chosen: str) -> None:
    made = [replica(service, i, state) for i, (service, state) in enumerate(replicas)]
    assert probe.place("edge-1", made, TIERS) == f"http://{chosen}:8000"
    with pytest.raises(Conflict, match="no replica is loaded on edge-2"):
        probe.place("edge-2", made, TIERS)


async def test_either_end_measures_and_the_narrower_way_counts() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        here = request.url.host == "here"
        return httpx.Response(200, json={"latency_s": 0.01 if here else 0.03, "bandwidth_bytes_per_s": 8e6 if here else 2e6})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
        pair = await probe.measure(client, "http://here", "http://there")
    assert pair.link == Link(latency_s=0.02, bandwidth_bytes_per_s=2e6)


async def test_a_stage_that_cannot_measure_is_told() -> None:
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(502, text="gone"))) as client:
        with pytest.raises(RunFailed, match="could not measure the way to http://there: HTTP 502: gone"):
            await probe.measure(client, "http://here", "http://there")


def test_only_the_links_of_a_file_change() -> None:
    text = "# about it\n" + TESTBED.replace("models:\n", "# of the models\nmodels:\n")
    found = probe.with_links(text, load().testbed, MEASURED)
    line = "  - {between: [edge-1, edge-2], latency: 12.3ms, bandwidth: 40Mb/s}"
    assert found == text.replace("  - {between: [edge-1, edge-2], latency: 1ms, bandwidth: 1Gb/s}", line)
    assert parse(found, "new.yaml").testbed.links[0].bandwidth == pytest.approx(5e6)


def test_links_in_one_line_are_replaced_too() -> None:
    flow = TESTBED.replace(
        "links:\n  - {between: [edge-1, edge-2], latency: 1ms, bandwidth: 1Gb/s}",
        "links: [{between: [edge-1, edge-2], latency: 1ms, bandwidth: 1Gb/s}]",
    )
    assert len(parse(probe.with_links(flow, load(flow).testbed, MEASURED), "new.yaml").testbed.links) == 1


def test_a_file_without_links_gets_some_after_its_nodes() -> None:
    bare = TESTBED.replace("links:\n  - {between: [edge-1, edge-2], latency: 1ms, bandwidth: 1Gb/s}\n", "")
    found = probe.with_links(bare, load(bare).testbed, MEASURED)
    assert found.index("edge-2: {cpus") < found.index("links:") < found.index("models:")
    assert parse(found, "new.yaml").testbed.latencies_s()["edge-1", "edge-2"] == pytest.approx(0.0123)


def test_a_pair_that_was_not_measured_keeps_its_link() -> None:
    text = TESTBED.replace(
        "links:\n",
        "  edge-3: {cpus: 1, memory: 1GiB}\nlinks:\n  - {between: [edge-3, edge-1], latency: 7ms, bandwidth: 1Gb/s}\n",
    )
    found = parse(probe.with_links(text, load(text).testbed, MEASURED), "new.yaml").testbed.latencies_s()
    assert found["edge-1", "edge-3"] == pytest.approx(0.007)
    assert found["edge-1", "edge-2"] == pytest.approx(0.0123)


def test_what_could_not_be_measured_is_no_link() -> None:
    row = {"between": ["a", "b"], "latency_s": 0.1, "bandwidth_bytes_per_s": 2.0, "directions": []}
    assert probe.links([row, {"between": ["a", "c"], "problem": "gone"}]) == {
        ("a", "b"): Link(latency_s=0.1, bandwidth_bytes_per_s=2.0)
    }
