"""The queue and the batch rule: urgent first, doomed out, and no batch that costs more than it saves or makes its head late."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from models.manifest import ServiceLaw
from services.dataplane.batching import DeadlineQueue, Waiting, batch_units, expected_wait_s, next_batch
from services.dataplane.service_time import WINDOW, ServiceEstimate

LAW = ServiceLaw(base_s=0.004, per_unit_s=1e-4, tail_ratio=1.25)
"""A batch of u units takes 4 ms + u x 0.1 ms, and 95 % are done within a quarter more."""


def estimate() -> ServiceEstimate:
    return ServiceEstimate(LAW)


def waiting(task: str, due: float, *lengths: int, items: int = 1, mean_s: float = 0.01) -> Waiting[str]:
    return Waiting(task, due, items, lengths, enqueued=0.0, mean_s=mean_s)


def queue_of(*entries: Waiting[str], capacity: int = 64) -> DeadlineQueue[str]:
    queue: DeadlineQueue[str] = DeadlineQueue(capacity)
    for entry in entries:
        queue.push(entry)
    return queue


def names(entries: list[Waiting[str]]) -> list[str]:
    return [entry.task for entry in entries]


# --- the queue ------------------------------------------------------------------------------------------------------------


def test_the_most_urgent_come_first_and_ties_in_order_of_arrival() -> None:
    queue = queue_of(waiting("c", 3), waiting("a", 1), waiting("b1", 2), waiting("b2", 2), waiting("b3", 2))
    assert names(queue.most_urgent(1)) == ["a"]
    assert names(queue.most_urgent(4)) == ["a", "b1", "b2", "b3"]
    assert names(queue.most_urgent(9)) == ["a", "b1", "b2", "b3", "c"]
    assert len(queue) == 5  # looking takes nothing out


def test_an_empty_queue_has_nobody() -> None:
    queue = queue_of()
    assert queue.most_urgent(1) == queue.most_urgent(5) == []
    assert (len(queue), queue.backlog_s, queue.full) == (0, 0.0, False)


def test_a_full_queue_takes_nobody_until_somebody_leaves() -> None:
    first = waiting("a", 1)
    queue = queue_of(first, waiting("b", 2), capacity=2)
    assert queue.full
    with pytest.raises(OverflowError, match="2 tasks"):
        queue.push(waiting("c", 0))
    assert len(queue) == 2
    queue.remove(first)
    queue.push(waiting("c", 0))
    assert names(queue.most_urgent(3)) == ["c", "b"]


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_queue_without_room_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        DeadlineQueue[str](capacity)


def test_the_cancelled_are_counted_out_at_once_and_only_once() -> None:
    a, b, c = waiting("a", 1, mean_s=0.1), waiting("b", 2, mean_s=0.2), waiting("c", 3, mean_s=0.4)
    queue = queue_of(a, b, c)
    queue.remove(b)
    queue.remove(b)
    assert len(queue) == 2
    assert queue.backlog_s == pytest.approx(0.5)
    assert names(queue.most_urgent(3)) == ["a", "c"]
    queue.remove(a)
    assert names(queue.most_urgent(1)) == ["c"]
    queue.remove(c)
    assert (len(queue), queue.backlog_s) == (0, 0.0)


class QueueMachine(RuleBasedStateMachine):
    """Pushes, cancellations and takings in any order, against a plain list."""

    CAPACITY = 5

    def __init__(self) -> None:
        super().__init__()
        self.queue: DeadlineQueue[int] = DeadlineQueue(self.CAPACITY)
        self.inside: list[Waiting[int]] = []
        self.outside: list[Waiting[int]] = []
        self.count = 0

    @precondition(lambda self: len(self.inside) < self.CAPACITY)
    @rule(due=st.integers(0, 4), mean_s=st.floats(0, 1))
    def push(self, due: int, mean_s: float) -> None:
        entry = Waiting(self.count, float(due), 1, (), 0.0, mean_s)
        self.count += 1
        self.queue.push(entry)
        self.inside.append(entry)

    @precondition(lambda self: self.inside)
    @rule(where=st.integers(0, CAPACITY - 1))
    def remove(self, where: int) -> None:
        entry = self.inside.pop(where % len(self.inside))
        self.queue.remove(entry)
        self.outside.append(entry)

    @precondition(lambda self: self.outside)
    @rule()
    def remove_again(self) -> None:
        self.queue.remove(self.outside[-1])

    @rule(count=st.integers(1, 7))
    def look(self, count: int) -> None:
        in_order = sorted(self.inside, key=lambda entry: entry.due)  # sorted() is stable, as the queue must be
        assert self.queue.most_urgent(count) == in_order[:count]

    @rule()
    def take(self) -> None:
        first = min(self.inside, key=lambda entry: entry.due, default=None)
        assert self.queue.take() is first
        if first is not None:
            self.inside.remove(first)
            self.outside.append(first)

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.queue) == len(self.inside)
        assert self.queue.full == (len(self.inside) == self.CAPACITY)
        assert self.queue.backlog_s == pytest.approx(sum(entry.mean_s for entry in self.inside), abs=1e-9)
        assert len(self.queue._heap) <= 2 * self.CAPACITY


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_the_heap_stays_small_while_tasks_come_and_are_cancelled_behind_one_that_stays() -> None:
    queue = queue_of(waiting("stays", -1.0), capacity=8)
    for i in range(1000):
        entry = waiting(str(i), float(i))
        queue.push(entry)
        queue.remove(entry)
        assert len(queue._heap) <= 16
    assert names(queue.most_urgent(2)) == ["stays"]


def test_who_leaves_from_the_front_leaves_nothing_in_the_heap() -> None:
    entries = [waiting(str(i), float(i)) for i in range(4)]
    queue = queue_of(*entries)
    queue.remove(entries[1])
    queue.remove(entries[0])
    assert [entry[2].task for entry in queue._heap] == ["2", "3"]
    assert queue.take() is entries[2]
    assert len(queue._heap) == 1


def test_the_backlog_does_not_drift() -> None:
    queue = queue_of(capacity=4)
    for i in range(2000):
        entries = [waiting("x", float(i), mean_s=0.1), waiting("y", float(i), mean_s=1e-7)]
        for entry in entries:
            queue.push(entry)
        for entry in entries:
            queue.remove(entry)
    assert queue.backlog_s == 0.0


# --- the rule, in rows ----------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_longest_member_along_every_axis() -> None:
    assert batch_units([waiting("a", 1, 3, 7), waiting("b", 1, 5, 2, items=2)]) == 3 * 5 * 7
    assert batch_units([waiting("a", 1), waiting("b", 1, items=4)]) == 5
    assert waiting("a", 1, 3, 7, items=2).units == 42


@pytest.mark.parametrize(
    ("sentence", "entries", "max_items", "batch", "doomed"),
    [
        ("nobody queued, nothing to do", [], 8, [], []),
        ("one task goes alone", [("a", 1.0, 10)], 8, ["a"], []),
        ("like lengths go together", [("a", 1.0, 10), ("b", 2.0, 10), ("c", 3.0, 10)], 8, ["a", "b", "c"], []),
        ("but no more than the model takes", [("a", 1.0, 10), ("b", 2.0, 10), ("c", 3.0, 10)], 2, ["a", "b"], []),
        (
            "what a batch costs already is not held against the next",
            [(c, 1.0, 10) for c in "abcdefgh"],
            8,
            list("abcdefgh"),
            [],
        ),
        ("a batch of one is one", [("a", 1.0, 10), ("b", 2.0, 10)], 1, ["a"], []),
        # 4 ms + 20 units 2 ms, x 1.25 = 7.5 ms for both.
        ("a second joins while the first is still in time", [("a", 0.0076, 10), ("b", 1.0, 10)], 8, ["a", "b"], []),
        ("and does not where it would make the first late", [("a", 0.0074, 10), ("b", 1.0, 10)], 8, ["a"], []),
        # Alone 4 + 0.1 and 4 + 30 ms; together 4 + 60 ms.
        ("a long one beside a short one costs more than both apart", [("a", 1.0, 1), ("b", 2.0, 300)], 8, ["a"], []),
        (
            "but the rule looks past it for one of like length",
            [("a", 1.0, 1), ("b", 2.0, 300), ("c", 3.0, 2)],
            8,
            ["a", "c"],
            [],
        ),
        # Alone 4 ms + 10 units 1 ms, x 1.25 = 6.25 ms.
        ("a task that cannot be done in time is dropped", [("a", 0.0062, 10)], 8, [], ["a"]),
        ("one that just can be is computed", [("a", 0.0063, 10)], 8, ["a"], []),
        ("the doomed do not keep the others", [("a", -1.0, 10), ("b", 0.001, 10), ("c", 1.0, 10)], 8, ["c"], ["a", "b"]),
        ("a long task is doomed where a short one is not", [("a", 0.01, 100), ("b", 0.01, 10)], 8, ["b"], ["a"]),
        ("the doomed join no batch", [("a", 0.0076, 10), ("b", 0.0076, 10), ("c", 0.001, 10)], 8, ["a", "b"], ["c"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batches(
    sentence: str, entries: list[tuple[str, float, int]], max_items: int, batch: list[str], doomed: list[str]
) -> None:
    del sentence
    queue = queue_of(*(waiting(name, due, length) for name, due, length in entries))
    taken, dropped = next_batch(queue, 0.0, estimate(), max_items)
    assert (names(taken), names(dropped)) == (batch, doomed)
    assert len(queue) == len(entries) - len(batch) - len(doomed)


def test_tasks_of_several_items_count_by_items() -> None:
    a, b, c = (waiting(name, due, 4, items=n) for name, due, n in (("a", 1.0, 3), ("b", 2.0, 6), ("c", 3.0, 5)))
    taken, _ = next_batch(queue_of(a, b, c), 0.0, estimate(), 8)
    assert names(taken) == ["a", "c"]


def test_a_task_of_more_items_than_a_batch_holds_is_computed_alone() -> None:
    big = waiting("big", 10.0, 4, items=20)
    taken, _ = next_batch(queue_of(big, waiting("b", 11.0, 4)), 0.0, estimate(), 8)
    assert names(taken) == ["big"]


def test_what_is_doomed_depends_on_what_batches_take_now() -> None:
    slow = estimate()
    for _ in range(WINDOW):
        slow.observe(10, 3 * LAW.mean_s(10))
    entry = ("a", 0.010, 10)
    assert names(next_batch(queue_of(waiting(*entry)), 0.0, estimate(), 8)[0]) == ["a"]
    assert names(next_batch(queue_of(waiting(*entry)), 0.0, slow, 8)[1]) == ["a"]


def test_a_cancelled_task_is_neither_computed_nor_dropped() -> None:
    gone = waiting("gone", 0.5, 10)
    queue = queue_of(gone, waiting("late", -1.0, 10), waiting("a", 1.0, 10))
    queue.remove(gone)
    taken, dropped = next_batch(queue, 0.0, estimate(), 8)
    assert (names(taken), names(dropped)) == (["a"], ["late"])


def test_a_stage_that_was_slow_for_a_while_serves_again() -> None:
    # A film: a neighbour slows the stage by 20 for a while, then leaves. Every task allows ten times what the law says.
    learnt = estimate()
    budget_s = 10 * LAW.mean_s(10)
    for _ in range(WINDOW):
        learnt.observe(10, 20 * LAW.mean_s(10))
    for i in range(1000):
        now = float(i)
        batch, _ = next_batch(queue_of(waiting("a", now + budget_s, 10)), now, learnt, 8)
        if batch:
            learnt.observe(batch_units(batch), LAW.mean_s(10))
    assert names(next_batch(queue_of(waiting("a", 1e6 + budget_s, 10)), 1e6, learnt, 8)[0]) == ["a"]


# --- the rule, as properties ----------------------------------------------------------------------------------------------

_laws = st.builds(ServiceLaw, base_s=st.floats(0, 0.05), per_unit_s=st.floats(0, 1e-3), tail_ratio=st.floats(1, 3))


@st.composite
def _situations(draw: st.DrawFn) -> tuple[DeadlineQueue[Any], list[Waiting[int]], ServiceEstimate, int]:
    axes = draw(st.integers(0, 2))
    entries = [
        Waiting(
            i,
            draw(st.floats(-0.1, 0.5)),
            draw(st.integers(1, 4)),
            tuple(draw(st.lists(st.integers(1, 40), min_size=axes, max_size=axes))),
            0.0,
            0.01,
        )
        for i in range(draw(st.integers(0, 14)))
    ]
    learnt = ServiceEstimate(draw(_laws))
    for units, seconds in draw(st.lists(st.tuples(st.integers(1, 99), st.floats(1e-4, 0.05)), max_size=6)):
        learnt.observe(units, seconds)
    queue: DeadlineQueue[Any] = DeadlineQueue(64)
    for entry in entries:
        queue.push(entry)
    for entry in entries[:: draw(st.integers(2, 5))]:
        if draw(st.booleans()):
            queue.remove(entry)
    return queue, [entry for entry in entries if not entry.gone], learnt, draw(st.integers(1, 10))


@settings(max_examples=120, deadline=None)
@given(_situations())
def test_what_a_batch_may_and_may_not_be(
    situation: tuple[DeadlineQueue[Any], list[Waiting[int]], ServiceEstimate, int],
) -> None:
    queue, entries, learnt, max_items = situation
    now = 0.0
    batch, doomed = next_batch(queue, now, learnt, max_items)

    # Everybody is in exactly one place.
    left = [entry for entry in entries if not entry.gone]
    assert sorted(entry.task for entry in [*batch, *doomed, *left]) == sorted(entry.task for entry in entries)
    assert len(queue) == len(left)
    assert all(entry.gone for entry in [*batch, *doomed])

    # Doomed are those whom the tail condemns, and all who stand before the head.
    assert all(now + learnt.tail_s(entry.units) > entry.due for entry in doomed)
    if not batch:
        assert not left
        return
    head = batch[0]
    assert all(head.due <= entry.due for entry in [*batch, *left])

    # The batch never passes a deadline it could meet, costs no more than its members apart, and fits the model.
    units = batch_units(batch)
    assert now + learnt.tail_s(units) <= head.due
    assert learnt.mean_s(units) <= math.fsum(learnt.mean_s(entry.units) for entry in batch) * (1 + 1e-9)
    assert len(batch) == 1 or sum(entry.items for entry in batch) <= max_items


@settings(max_examples=40, deadline=None)
@given(_situations())
def test_batch_after_batch_empties_the_queue(
    situation: tuple[DeadlineQueue[Any], list[Waiting[int]], ServiceEstimate, int],
) -> None:
    queue, entries, learnt, max_items = situation
    seen: list[int] = []
    for _ in range(len(entries) + 1):
        batch, doomed = next_batch(queue, 0.0, learnt, max_items)
        seen += [entry.task for entry in [*batch, *doomed]]
        if not batch:
            break
    assert sorted(seen) == sorted(entry.task for entry in entries)
    assert (len(queue), queue.backlog_s) == (0, 0.0)


# --- without some of the rules --------------------------------------------------------------------------------------------


def test_a_queue_in_order_of_arrival_does_not_look_at_deadlines() -> None:
    queue: DeadlineQueue[str] = DeadlineQueue(8, urgent_first=False)
    for entry in (waiting("first", 9.0), waiting("second", 1.0), waiting("third", 5.0)):
        queue.push(entry)
    assert names(queue.most_urgent(3)) == ["first", "second", "third"]


def test_without_shedding_what_is_past_saving_is_computed_and_bounds_no_batch() -> None:
    queue = queue_of(waiting("late", 0.5), waiting("later", 0.6), waiting("in time", 99.0))
    batch, doomed = next_batch(queue, 1.0, estimate(), 8, shed=False)
    assert (names(batch)[0], doomed) == ("late", [])
    alone, doomed = next_batch(queue_of(waiting("late", 0.5)), 1.0, estimate(), 8)
    assert (alone, names(doomed)) == ([], ["late"])


# --- the wait -------------------------------------------------------------------------------------------------------------


def test_a_free_slot_means_no_wait() -> None:
    assert expected_wait_s(queue_of(), [5.0], slots=2, now=1.0) == 0.0


def test_the_wait_is_what_is_queued_and_what_is_left_of_the_batches_over_the_slots() -> None:
    queue = queue_of(waiting("a", 9, mean_s=0.3), waiting("b", 9, mean_s=0.1))
    # One batch has 0.2 s left; the other should have ended already.
    assert expected_wait_s(queue, [1.2, 0.9], slots=2, now=1.0) == pytest.approx((0.4 + 0.2) / 2)
