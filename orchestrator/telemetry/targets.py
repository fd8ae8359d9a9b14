"""What a Prometheus server is told to scrape: the document of `GET /v1/targets` (HTTP service discovery). Pure.

The labels are chosen so that none is also a label of the pages (`stage`, `node`, `pipeline`), which stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.telemetry.sources import Endpoint

STAGE_JOB, GATEWAY_JOB = "stage", "gateway"


def document(stages: Sequence[Endpoint], gateways: Sequence[Endpoint]) -> list[dict[str, Any]]:
    """The full list, each time: one group per replica and per gateway."""
    jobs = ((STAGE_JOB, stages), (GATEWAY_JOB, gateways))
    return [
        {"targets": [endpoint.instance], "labels": {"job": job, "replica": endpoint.name}}
        for job, endpoints in jobs
        for endpoint in endpoints
    ]
