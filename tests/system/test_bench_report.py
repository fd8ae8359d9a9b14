"""`espalier bench`, and so `make demo`, writes the report that is documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadgen.outcome import OUTCOMES
from tests.system.edge import SERVICES, TESTBED, Edge


def test_the_report_has_the_documented_keys_over_all_and_per_pipeline(edge: Edge, tmp_path: Path) -> None:
    edge.want(tokenise=2, encode=2, pool=2)
    path = tmp_path / "report.json"
    edge.espalier("bench", str(TESTBED), "--duration", "3", "--warmup", "0.5", "--report", str(path))
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["schema"] == 1
    assert list(report["pipelines"]) == ["embed"]
    for section in (report, report["pipelines"]["embed"]):
        assert 0 < section["on_time_ratio"] <= 1
        assert section["sent"] == sum(section["outcomes"].values()) > 20
        assert set(section["outcomes"]) == set(OUTCOMES)
        assert 0 < section["latency_s"]["p50"] <= section["latency_s"]["p95"] <= section["latency_s"]["p99"]
        assert section["send_lag_s"].keys() >= {"p50", "p99", "max"}
        assert section["stages"].keys() == set(SERVICES)
        for stage in section["stages"].values():
            assert stage.keys() >= {"queue_s", "compute_s", "transfer_s", "share", "visits"}
            assert stage["visits"] >= section["outcomes"]["on_time"]
        assert section["cost"] > 0
    assert report["cost"] == report["pipelines"]["embed"]["cost"], "there is but one pipeline to pay for it"
