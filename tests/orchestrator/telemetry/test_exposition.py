from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from orchestrator.telemetry import exposition
from orchestrator.telemetry.exposition import Sample

LABELS = (("node", "a"), ("stage", "s"))


def counted(t: float, value: float) -> Sample:
    return Sample(t, {("stage_requests_total", LABELS): value})


def test_only_the_series_that_are_looked_at_are_read() -> None:
    registry = CollectorRegistry()
    Counter("espalier_stage_requests", "n", ["stage", "node"], registry=registry).labels("s", "a").inc(3)
    Gauge("espalier_stage_queue_length", "n", ["stage", "node"], registry=registry).labels("s", "a").set(2)
    Gauge("espalier_something_else", "n", registry=registry).set(1)
    Histogram("espalier_stage_compute_duration_seconds", "s", ["stage", "node"], registry=registry).labels("s", "a").observe(
        0.5
    )
    sample = exposition.parse(generate_latest(registry).decode() + "process_cpu_seconds_total 5\n", 1.0)
    assert dict(sample.values) == {
        ("stage_requests_total", LABELS): 3.0,
        ("stage_queue_length", LABELS): 2.0,
        ("stage_compute_duration_seconds_sum", LABELS): 0.5,
        ("stage_compute_duration_seconds_count", LABELS): 1.0,
    }


def test_growth_is_over_the_time_between_the_samples() -> None:
    grown = exposition.growth(counted(10.0, 100), counted(12.5, 150))
    assert grown.interval_s == 2.5
    assert grown.sum("stage_requests_total") == 50


@pytest.mark.parametrize(("before", "after", "growth"), [(100, 100, 0), (100, 30, 30), (0, 5, 5)])
def test_a_counter_that_fell_was_reset_and_counts_from_zero(before: float, after: float, growth: float) -> None:
    assert exposition.growth(counted(0, before), counted(1, after)).sum("stage_requests_total") == growth


def test_a_counter_that_is_new_counts_from_zero() -> None:
    assert exposition.growth(Sample(0.0, {}), counted(1, 4)).sum("stage_requests_total") == 4


@pytest.mark.parametrize("page", ["espalier_stage_queue_length{stage=} x\n", "espalier_stage_queue_length nonsense\n"])
def test_a_page_that_is_no_exposition_is_a_value_error(page: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        exposition.parse(page, 0.0)


def test_another_page_has_nothing_to_say() -> None:
    assert exposition.parse("<html>not found</html>", 0.0).values == {}
