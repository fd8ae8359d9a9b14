"""How the container's processor quota is read from both kinds of cgroup."""

from __future__ import annotations

import os

import pytest

from services.stage.quota import cpus, parse_v1, parse_v2


@pytest.mark.parametrize(
    ("text", "processors"),
    [
        (None, None),
        ("", None),
        ("max 100000", None),
        ("max", None),
        ("100000 100000", 1.0),
        ("50000 100000", 0.5),
        ("350000 100000", 3.5),
        ("20000 50000\n", 0.4),
    ],
)
def test_cgroup_v2(text: str | None, processors: float | None) -> None:
    assert parse_v2(text) == processors


@pytest.mark.parametrize(
    ("quota", "period", "processors"),
    [
        (None, None, None),
        ("-1", "100000", None),
        ("0", "100000", None),
        ("50000", None, None),
        (None, "100000", None),
        ("150000", "100000", 1.5),
    ],
)
def test_cgroup_v1(quota: str | None, period: str | None, processors: float | None) -> None:
    assert parse_v1(quota, period) == processors


def test_a_limit_only_ever_lowers_what_the_machine_gives() -> None:
    machine = cpus()
    assert 0 < machine <= len(os.sched_getaffinity(0))
    assert cpus(machine / 2) == machine / 2
    assert cpus(machine + 100) == machine


def test_the_affinity_mask_counts() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert cpus() <= 1.0
    finally:
        os.sched_setaffinity(0, allowed)
