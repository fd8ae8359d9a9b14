from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.stage.metrics import StageMetrics


def test_the_squares_of_compute_times_tell_their_variance() -> None:
    metrics = StageMetrics("encode", "edge-1")
    for seconds in (0.1, 0.3):
        metrics.computed(0.0, seconds)
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }
    count, total = (values[f"espalier_stage_compute_duration_seconds_{what}"] for what in ("count", "sum"))
    squares = values["espalier_stage_compute_seconds_squared_total"]
    assert squares / count - (total / count) ** 2 == pytest.approx(0.01)
