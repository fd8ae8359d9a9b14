from __future__ import annotations

from orchestrator.telemetry import sources, targets
from orchestrator.telemetry.sources import Endpoint
from tests.orchestrator.telemetry.pages import replica


def test_one_group_for_everybody_who_has_something_to_say() -> None:
    replicas = [
        replica("pool-1", "http://127.0.0.1:4001"), replica("pool-2", "http://pool-2:8000", "standby"),
        replica("pool-3", "http://10.0.0.3:8000", "draining"), replica("pool-4", "http://10.0.0.4:8000", "starting"),
    ]  # fmt: skip
    assert targets.document(sources.sampled(replicas), [Endpoint("gateway-1", "http://gateway")]) == [
        {"targets": ["127.0.0.1:4001"], "labels": {"job": "stage", "replica": "pool-1"}},
        {"targets": ["pool-2:8000"], "labels": {"job": "stage", "replica": "pool-2"}},
        {"targets": ["10.0.0.3:8000"], "labels": {"job": "stage", "replica": "pool-3"}},
        {"targets": ["gateway:80"], "labels": {"job": "gateway", "replica": "gateway-1"}},
    ]


def test_nobody_is_an_empty_list() -> None:
    assert targets.document([], []) == []
