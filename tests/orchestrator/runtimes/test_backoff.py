from __future__ import annotations

from orchestrator.runtimes.backoff import Backoff


def test_the_first_failure_is_forgiven_and_the_next_ones_cost_more_and_more() -> None:
    backoff, pauses = Backoff(), []
    for _ in range(9):
        backoff = backoff.after_failure(100.0, lived_s=0.0)
        pauses.append(backoff.until - 100.0)
    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_long_life_begins_the_count_anew() -> None:
    assert Backoff(failures=6, until=50.0, total=9).after_failure(100.0, lived_s=31.0) == Backoff(1, 100.0, total=10)
