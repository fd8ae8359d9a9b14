"""Links are measured by the stages that run, and what was measured is what gateways then count with."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator import testbed as testbeds
from services.dataplane import routes
from tests.system.edge import TESTBED, Edge, until


def test_a_link_is_measured_saved_and_used(edge: Edge, tmp_path: Path) -> None:
    # One replica of a service on either node, since there is something to measure from only then.
    edge.want(tokenise=2, encode=2, pool=2)
    saved = tmp_path / "measured.yaml"
    (row,) = json.loads(edge.espalier("probe", str(TESTBED), "--save", str(saved), "-o", "json"))["links"]
    assert row["between"] == ["edge-1", "edge-2"]
    assert len(row["directions"]) == 2
    assert row["bandwidth_bytes_per_s"] == min(each["bandwidth_bytes_per_s"] for each in row["directions"]) > 0
    assert testbeds.load(saved).testbed.links[0].bandwidth > 0
    assert "edge-1 - edge-2" in edge.espalier("probe", str(TESTBED), "--between", "edge-2", "edge-1").replace(
        "edge-2 - edge-1", "edge-1 - edge-2"
    )
    # As if the link had been found slow: another file with the same services is an update of the routes alone.
    slow = saved.read_text().split("links:\n")
    line = "  - {between: [edge-1, edge-2], latency: 40ms, bandwidth: 8Mb/s}"
    saved.write_text(slow[0] + "links:\n" + line + "\n" + slow[1].split("\n", 1)[1])
    pids = edge.pids()
    edge.up(saved)

    def known() -> bool:
        kept = routes.load(edge.state.gateway_routes)
        return kept is not None and bool(kept.links) and kept.links["edge-1"]["edge-2"].latency_s == 0.04

    until(known, "the gateway counts with the new link")
    assert edge.pids() == pids, "no replica was disturbed"
    edge.up()
