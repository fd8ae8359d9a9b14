"""What a task is predicted to take, and when the prediction is no reason to refuse it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dataplane.admission import at_most_s, critical_path_s, excess_s, replica_s
from services.dataplane.pipeline import Pipeline, segments
from services.dataplane.routing import STALE_S, RouteBook
from tests.services.dataplane.test_pipeline import CLASSIFY, EMBED, dags


def book_of(*reports: tuple[str, float, float]) -> RouteBook:
    """Replicas as (id, reported at, wait); each has 10 ms of service and 1 ms of transfer."""
    book = RouteBook()
    for replica, at, wait_s in reports:
        book.answered(replica, at, wait_s=wait_s, service_s=0.010, transfer_s=0.001)
    return book


def test_a_hop_takes_what_its_best_replica_takes() -> None:
    book = book_of(("a", 10.0, 0.5), ("b", 10.0, 0.2))
    assert replica_s(book, ["a", "b"], 10.0) == pytest.approx(0.211)
    assert replica_s(book, ["a", "b"], 10.15) == pytest.approx(0.061)


def test_what_was_sent_since_the_report_counts() -> None:
    book = book_of(("a", 10.0, 0.2))
    for _ in range(5):
        book.sent("a", 10.0)
    assert replica_s(book, ["a"], 10.0) == pytest.approx(0.261)


def test_stale_news_of_any_replica_admits() -> None:
    book = book_of(("a", 10.0, 5.0), ("b", 11.0, 5.0))
    assert replica_s(book, ["a", "b"], 11.0) > 4  # both still fresh
    assert replica_s(book, ["a", "b"], 10.0 + STALE_S + 0.001) == 0
    assert replica_s(book, ["b"], 10.0 + STALE_S + 0.001) > 4


def test_a_replica_never_heard_of_admits() -> None:
    assert replica_s(book_of(("a", 10.0, 5.0)), ["a", "new"], 10.0) == 0


def test_an_ejected_replica_is_not_the_best_one() -> None:
    book = book_of(("a", 10.0, 0.5), ("b", 10.0, 0.0))
    book.failed("b", 10.0)
    assert replica_s(book, ["a", "b"], 10.0) == pytest.approx(0.511)


def test_the_silence_of_an_ejected_replica_does_not_open_the_door() -> None:
    # It fails again and again, and stays ejected for longer than news stay fresh.
    book = book_of(("a", 10.0, 5.0), ("b", 10.0, 0.0))
    for at in (10.0, 11.0, 13.0):
        book.failed("b", at)
    book.answered("a", 15.0, wait_s=5.0)
    assert book.ejected("b", 15.0)
    assert replica_s(book, ["a", "b"], 15.0) > 4
    assert replica_s(book, ["a", "b"], 17.0) == 0  # it may be back, and a's news is stale too


def test_where_all_are_ejected_somebody_has_to_find_out() -> None:
    book = book_of(("a", 10.0, 5.0))
    book.failed("a", 10.0)
    assert replica_s(book, ["a"], 10.0) == 0


@given(
    st.lists(st.tuples(st.floats(0, 12), st.floats(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=4),
    st.floats(10, 14),
)
def test_what_a_hop_takes_at_most_is_never_less_than_what_it_takes(
    reports: list[tuple[float, float, int, bool]], now: float
) -> None:
    book = RouteBook()
    replicas = [f"r{i}" for i in range(len(reports))]
    for replica, (at, wait_s, sent, dead) in zip(replicas, reports, strict=True):
        book.answered(replica, at, wait_s=wait_s, service_s=0.01, transfer_s=0.001)
        for _ in range(sent):
            book.sent(replica, at)
        if dead:
            book.failed(replica, at)
    assert at_most_s(book, replicas, now) >= replica_s(book, replicas, now)


@pytest.mark.parametrize(("predicted_s", "budget_s", "late_s"), [(0.3, 0.2, 0.1), (0.2, 0.2, 0.0), (0.0, 0.2, -0.2)])
def test_the_excess_is_what_the_prediction_misses_the_budget_by(predicted_s: float, budget_s: float, late_s: float) -> None:
    assert excess_s(predicted_s, budget_s) == pytest.approx(late_s)


def test_a_chain_takes_the_sum_of_its_hops() -> None:
    hop_s = {"tokenise-svc": 0.001, "encode-svc": 0.02, "pool-svc": 0.002}
    assert critical_path_s(segments(EMBED), hop_s) == pytest.approx(0.023)


def test_of_two_branches_the_longer_one_counts() -> None:
    hop_s = {f"{step.id}-svc": 0.01 for step in CLASSIFY.steps}
    assert critical_path_s(segments(CLASSIFY), hop_s) == pytest.approx(0.04)
    assert critical_path_s(segments(CLASSIFY), hop_s | {"encode-labels-svc": 0.5}) == pytest.approx(0.53)


def _longest_way_s(pipeline: Pipeline, hop_s: dict[str, float]) -> float:
    by_id = {step.id: step for step in pipeline.steps}

    def end_s(step_id: str) -> float:
        step = by_id[step_id]
        return hop_s[step.service] + max((end_s(parent) for parent in step.parents), default=0.0)

    return max(end_s(step.id) for step in pipeline.steps)


@settings(max_examples=80, deadline=None)
@given(dags(), st.lists(st.floats(0, 1), min_size=9, max_size=9))
def test_the_critical_path_is_the_longest_way_through_the_segments(pipeline: Pipeline, times_s: list[float]) -> None:
    hop_s = {step.service: time_s for step, time_s in zip(pipeline.steps, times_s, strict=False)}
    cut_up = segments(pipeline)

    def end_s(index: int) -> float:
        own = sum(hop_s[step.service] for step in cut_up[index].steps)
        return own + max((end_s(parent) for parent in cut_up[index].parents), default=0.0)

    predicted_s = critical_path_s(cut_up, hop_s)
    assert predicted_s == pytest.approx(max(end_s(index) for index in range(len(cut_up))))
    # Cutting into segments never makes a task look slower than its steps are, nor faster.
    assert predicted_s == pytest.approx(_longest_way_s(pipeline, hop_s))
