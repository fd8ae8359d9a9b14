from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from orchestrator import display


def text(what: Any) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(what)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


STATUS: dict[str, Any] = {
    "testbed": "small", "ready": False, "version": 7, "gateway": None, "decision": None, "cost": {"total": 12.34},
    "nodes": {"edge-1": {"state": "up", "replicas": 2}, "edge-9": {"state": "missing", "replicas": 0}},
    "slots": {"done": 9, "failed": 2}, "problem": "the engine does not answer",
    "update": {"state": "rolled_back", "sha256": "0", "reason": "pool on edge-1 failed 3 times in a row"},
    "services": {
        "pool": {
            "tier": "light", "states": {"ready": 1, "standby": 0, "starting": 1, "draining": 0},
            "wanted": {"ready": 2, "standby": 0},
            "failures": {"edge-1": 3, "edge-2": 1},
            "signal": {"arrival_rate": 12.5, "queue_length": 3.0, "wait_s": 0.0021, "service_s": None, "age_s": 0.4},
        },
        "encode": {
            "tier": "core", "states": {"ready": 0, "standby": 0, "starting": 0, "draining": 0},
            "wanted": {"ready": 1, "standby": 0},
            "failures": {}, "signal": None,
        },
    },
}  # fmt: skip


def test_the_status_says_what_is_known_and_leaves_a_dash_for_what_is_not() -> None:
    shown = text(display.status(STATUS))
    assert "testbed small: not ready, routes 7, gateway -, cost 12.3" in shown
    assert "2 of 9 slots failed" in shown
    assert "nodes: edge-9 missing" in shown
    assert "problem: the engine does not answer" in shown
    assert "update: rolled_back pool on edge-1 failed 3 times in a row" in shown
    assert "pool on edge-1: 3 failures in a row" in shown
    assert "edge-2" not in shown, "one failure is forgiven"
    (pool,) = [line.split() for line in shown.splitlines() if line.startswith("  pool")]
    assert pool == ["pool", "light", "1/2", "0/0", "1", "0", "12.5", "3", "2.1", "-", "0.4"]


def test_progress_fits_in_a_line() -> None:
    assert display.progress(STATUS) == "pool 1/2, encode 0/1, gateway -"


def test_a_shared_service_is_shown_with_the_pipelines_that_came_by() -> None:
    shown = text(display.shared({"encode": {"embed": 100, "classify": 40}}))
    assert ["encode", "140", "embed", "100,", "classify", "40"] in [line.split() for line in shown.splitlines()]


def test_costs_are_shown_by_pipeline_and_by_what_they_were_spent_on() -> None:
    report = {"cost": 30.0, "pipelines": {"embed": {"cost": 20.0}, "rank": {"cost": None}}}
    shown = text(display.costs(report, {"replicas": 25.0, "standby": 5.0}))
    assert [line.split() for line in shown.splitlines() if line.startswith("  embed") or line.startswith("  rank")] == [
        ["embed", "20.0"], ["rank", "-"],
    ]  # fmt: skip
    assert "30.0 (replicas 25.0, standby 5.0)" in shown
