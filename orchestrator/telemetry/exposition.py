"""From an exposition page to increments: the few series the orchestrator looks at, and how much they grew between two samples.

Pure. We take the differences of raw counters ourselves, with the times the samples were taken at; a counter that fell has been
reset by a restart, and what it shows since then is what it grew by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "espalier_"
GAUGES = frozenset({"stage_queue_length", "stage_inflight_requests"})
COUNTERS = frozenset({
    "requests_total",
    "stage_requests_total",
    "stage_queue_duration_seconds_sum",
    "stage_queue_duration_seconds_count",
    "stage_compute_duration_seconds_sum",
    "stage_compute_duration_seconds_count",
    "stage_compute_seconds_squared_total",
    "stage_batch_size_count",
})  # fmt: skip

Key = tuple[str, tuple[tuple[str, str], ...]]
"""Name without the prefix, and the labels by name."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One page, read at `t` [s]."""

    t: float
    values: Mapping[Key, float]


@dataclass(frozen=True, slots=True)
class Growth:
    """How much each counter grew over `interval_s` seconds."""

    interval_s: float = 0.0
    increments: Mapping[Key, float] = field(default_factory=dict)

    def sum(self, name: str) -> float:
        """Growth of a counter over all its labels."""
        return sum(value for (key, _), value in self.increments.items() if key == name)

    def has(self, name: str) -> bool:
        """Whether the counter was on both pages, with whatever labels."""
        return any(key == name for key, _ in self.increments)

    def by_labels(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Growth of a counter for each of its label sets."""
        return {labels: value for (key, labels), value in self.increments.items() if key == name}


def parse(text: str, t: float) -> Sample:
    """Read the series we look at.

    Raises:
        ValueError: the page is no exposition text.
    """
    # The parser is plain Python and histograms are long: give it only the lines that will be used.
    wanted = "\n".join(line for line in text.splitlines() if _name(line) in GAUGES | COUNTERS)
    values = {
        (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(wanted + "\n")
        for sample in family.samples
    }
    return Sample(t, values)


def growth(before: Sample, after: Sample) -> Growth:
    """Growth of every counter from one sample to the next; one that is new counts from zero."""
    increments = {}
    for key, value in after.values.items():
        if key[0] in COUNTERS:
            old = before.values.get(key, 0.0)
            increments[key] = value - old if value >= old else value
    return Growth(after.t - before.t, increments)


def gauge(sample: Sample, name: str) -> float:
    """Value of a gauge over all its labels."""
    return sum(value for (key, _), value in sample.values.items() if key == name)


def _name(line: str) -> str:
    if not line.startswith(PREFIX):
        return ""
    return line[len(PREFIX) :].partition("{")[0].partition(" ")[0]
