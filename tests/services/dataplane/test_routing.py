"""What a caller believes of its replicas, whom it tries first, and how many retries it may cost."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dataplane.routing import (
    FIRST_EJECTION_S,
    LONGEST_EJECTION_S,
    MAX_CANDIDATES,
    ReplicaView,
    RetryBudget,
    RouteBook,
)


def answered(book: RouteBook, replica: str, now: float, *, wait_s: float, service_s: float = 0.01) -> None:
    book.answered(replica, now, wait_s=wait_s, service_s=service_s, transfer_s=0.001)


# --- what is believed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "sent", "now", "expected_s"),
    [
        ("a fresh report is believed", [], 10.0, 0.3),
        ("it ages by the second", [], 10.2, 0.1),
        ("down to nothing", [], 10.9, 0.0),
        ("what was sent since comes on top", [10.0, 10.1], 10.2, 0.2),
        ("and is worked off as well", [10.0, 10.1], 10.35, 0.05),
        ("down to nothing, too", [10.0, 10.1], 10.9, 0.0),
        ("an idle replica begins when it is sent to", [10.5], 10.52, 0.03),
        ("one that has said nothing since may do nothing", [10.0, 10.1], 11.1, 0.1),
        ("while what was sent to it adds up", [10.0, 10.1, *(11.0 + i / 10 for i in range(20))], 13.0, 1.1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_expected_wait(sentence: str, sent: list[float], now: float, expected_s: float) -> None:
    del sentence
    book = RouteBook()
    answered(book, "a", 10.0, wait_s=0.3, service_s=0.05)
    for at in sent:
        book.sent("a", at)
    assert book.view("a").expected_wait_s(now) == pytest.approx(expected_s)


def test_an_unknown_replica_has_no_wait() -> None:
    assert ReplicaView().expected_wait_s(0.0) == 0.0


def test_completion_is_link_transfer_wait_and_service() -> None:
    book = RouteBook()
    answered(book, "a", 10.0, wait_s=0.1, service_s=0.02)
    assert book.completion_s("a", 0.005, 10.0) == pytest.approx(0.005 + 0.001 + 0.1 + 0.02)
    assert book.completion_s("never seen", 0.005, 10.0) == pytest.approx(0.005)


def test_an_answer_counts_what_was_sent_before_it_only() -> None:
    book = RouteBook()
    answered(book, "a", 1.0, wait_s=0.0)
    book.sent("a", 1.0)
    book.sent("a", 1.0)
    assert book.view("a").expected_wait_s(1.0) == pytest.approx(0.02)
    answered(book, "a", 2.0, wait_s=0.05)
    assert book.view("a").sent_since == 0
    book.sent("a", 2.0)
    assert book.view("a").expected_wait_s(2.0) == pytest.approx(0.06)


def test_service_time_is_the_first_answer_then_a_moving_average() -> None:
    book = RouteBook()
    answered(book, "a", 1.0, wait_s=0.0, service_s=0.010)
    assert book.view("a").service_s == pytest.approx(0.010)
    answered(book, "a", 2.0, wait_s=0.0, service_s=0.020)
    assert book.view("a").service_s == pytest.approx(0.012)
    for t in range(50):
        answered(book, "a", 3.0 + t, wait_s=0.0, service_s=0.020)
    assert book.view("a").service_s == pytest.approx(0.020, rel=1e-3)


def test_a_refusal_reports_a_wait_but_no_service() -> None:
    book = RouteBook()
    answered(book, "a", 1.0, wait_s=0.0, service_s=0.010)
    book.answered("a", 2.0, wait_s=0.5)
    assert (book.view("a").service_s, book.view("a").expected_wait_s(2.0)) == (0.010, 0.5)


def test_replicas_that_are_gone_are_forgotten() -> None:
    book = RouteBook()
    for replica in "abc":
        answered(book, replica, 1.0, wait_s=0.3)
    book.forget_all_but(["b", "never seen"])
    assert [book.view(replica).expected_wait_s(1.0) for replica in "abc"] == [0.0, pytest.approx(0.3), 0.0]


# --- ejection -------------------------------------------------------------------------------------------------------------


def test_a_failure_ejects_for_a_second_then_for_twice_as_long_each_time() -> None:
    book = RouteBook()
    now = 100.0
    for expected_s in (1, 2, 4, 8, 16, 30, 30):
        assert not book.ejected("a", now)
        book.failed("a", now)
        assert book.ejected("a", now)
        assert book.ejected("a", now + expected_s - 0.001)
        now += expected_s
    assert (FIRST_EJECTION_S, LONGEST_EJECTION_S) == (1.0, 30.0)


def test_one_death_fails_every_task_in_flight_and_counts_once() -> None:
    book = RouteBook()
    for i in range(20):
        book.failed("a", 100.0 + i * 0.01)
    assert book.view("a").failures == 1
    assert not book.ejected("a", 101.0)


def test_an_answer_forgives_everything() -> None:
    book = RouteBook()
    book.failed("a", 100.0)
    book.failed("a", 102.0)
    answered(book, "a", 102.5, wait_s=0.0)
    assert not book.ejected("a", 102.5)
    book.failed("a", 103.0)
    assert not book.ejected("a", 104.0)


def test_a_replica_that_stays_dead_for_days_is_still_ejected_for_the_longest_time() -> None:
    # The orchestrator may be gone as well, so nobody takes the replica out of the routes.
    book = RouteBook()
    now = 0.0
    for _ in range(5000):
        book.failed("a", now)
        now = book.view("a").ejected_until
    book.failed("a", now)
    assert book.view("a").ejected_until == now + LONGEST_EJECTION_S


def test_a_replica_never_seen_is_not_ejected() -> None:
    assert not RouteBook().ejected("a", 0.0)


# --- order ----------------------------------------------------------------------------------------------------------------


def test_of_two_the_one_that_completes_sooner_comes_first_whatever_is_drawn() -> None:
    book = RouteBook()
    answered(book, "slow", 10.0, wait_s=0.2)
    answered(book, "fast", 10.0, wait_s=0.05)
    for seed in range(20):
        assert book.order(["slow", "fast"], [0.0, 0.0], 10.0, random.Random(seed)) == (1, 0)
        assert book.order(["slow", "fast"], [0.0, 0.2], 10.0, random.Random(seed)) == (0, 1)  # unless the link eats it up


def test_the_worst_of_three_never_comes_first_and_the_best_most_often() -> None:
    book = RouteBook()
    for replica, wait_s in (("a", 0.0), ("b", 0.1), ("c", 0.2)):
        answered(book, replica, 10.0, wait_s=wait_s)
    firsts = [book.order(["a", "b", "c"], [0.0] * 3, 10.0, random.Random(seed))[0] for seed in range(300)]
    assert 2 not in firsts  # the worst of all loses every comparison
    assert 150 < firsts.count(0) < 250  # the best wins whenever it is drawn: two times in three


def test_the_ejected_come_last_and_the_soonest_back_before_the_others() -> None:
    book = RouteBook()
    for replica, at in (("a", 10.0), ("b", 9.5)):
        book.failed(replica, at)
    for seed in range(20):
        assert book.order(["a", "b", "c"], [0.0, 0.0, 9.0], 10.1, random.Random(seed)) == (2, 1, 0)


def test_where_all_are_ejected_they_are_the_last_resort() -> None:
    book = RouteBook()
    for i, replica in enumerate("abcd"):
        book.failed(replica, 10.0 - i * 0.1)
    assert book.order(list("abcd"), [0.0] * 4, 10.05, random.Random(1)) == (3, 2, 1)


def test_an_ejected_one_is_not_tried_while_three_others_are_well() -> None:
    book = RouteBook()
    book.failed("a", 10.0)
    for seed in range(50):
        assert 0 not in book.order(list("abcd"), [0.0] * 4, 10.1, random.Random(seed))


def test_the_same_seed_gives_the_same_order() -> None:
    replicas, links_s = [str(i) for i in range(20)], [0.0] * 20
    orders = [RouteBook().order(replicas, links_s, 0.0, random.Random(7)) for _ in range(2)]
    assert orders[0] == orders[1]


@settings(max_examples=120, deadline=None)
@given(
    replicas=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 3)), max_size=8),
    now=st.floats(0, 10),
    seed=st.integers(0, 99),
)
def test_candidates_are_distinct_valid_and_as_many_as_there_can_be(
    replicas: list[tuple[float, float, int]], now: float, seed: int
) -> None:
    book = RouteBook()
    for i, (wait_s, reported, failures) in enumerate(replicas):
        answered(book, str(i), reported, wait_s=wait_s)
        for _ in range(failures):
            book.failed(str(i), max(book.view(str(i)).ejected_until, reported))
    ids = [str(i) for i in range(len(replicas))]
    order = book.order(ids, [0.0] * len(ids), now, random.Random(seed))
    assert len(order) == len(set(order)) == min(MAX_CANDIDATES, len(ids))
    assert all(0 <= i < len(ids) for i in order)
    ejected = [book.ejected(ids[i], now) for i in order]
    assert ejected == sorted(ejected), "an ejected one before a healthy one"
    healthy = sum(not book.ejected(replica, now) for replica in ids)
    assert ejected.count(False) == min(MAX_CANDIDATES, healthy)
    if healthy >= 2:
        completions = [book.completion_s(ids[i], 0.0, now) for i in order]
        assert completions[0] <= completions[1]


# --- retries --------------------------------------------------------------------------------------------------------------


def test_the_reserve_is_there_from_the_start_and_no_more_than_that_is_saved() -> None:
    budget = RetryBudget(ratio=0.5, reserve=3)
    for _ in range(1000):
        budget.request()
    assert [budget.allow() for _ in range(4)] == [True, True, True, False]


def test_requests_pay_for_retries() -> None:
    budget = RetryBudget(ratio=0.25, reserve=0.0)
    assert not budget.allow()
    budget = RetryBudget(ratio=0.25, reserve=1.0)
    assert budget.allow()
    for _ in range(3):
        budget.request()
        assert not budget.allow()
    budget.request()
    assert budget.allow()


@settings(max_examples=80, deadline=None)
@given(ratio=st.floats(0, 1), reserve=st.floats(0, 20), steps=st.lists(st.booleans(), max_size=300))
def test_retries_never_exceed_the_reserve_and_the_share_of_requests(ratio: float, reserve: float, steps: list[bool]) -> None:
    budget = RetryBudget(ratio, reserve)
    requests = retries = 0
    for is_request in steps:
        if is_request:
            budget.request()
            requests += 1
        else:
            retries += budget.allow()
        assert retries <= reserve + ratio * requests + 1e-9


def test_every_order_of_the_replicas_is_drawn_equally_often() -> None:
    # Nothing is known of any, so none is better, and the order is the one drawn.
    book, rng = RouteBook(), random.Random(7)
    for count in (2, 3, 5):
        drawn = Counter(book.order(list("abcde")[:count], [0.0] * count, 10.0, rng) for _ in range(6000))
        possible = math.perm(count, min(count, MAX_CANDIDATES))
        assert len(drawn) == possible
        expected = 6000 / possible
        # Chi squared, far beyond its 99.9 % point for up to 59 degrees of freedom.
        assert sum((n - expected) ** 2 / expected for n in drawn.values()) < 2.0 * possible + 40.0
