"""The rule for joining a running batch, and how long an answer takes. What deadlines promise of it is in test_deadlines.py."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.manifest import ServiceLaw
from services.dataplane.batching import DeadlineQueue, Waiting
from services.dataplane.generation import GenerationEstimate, Member, next_to_join

PREFILL = ServiceLaw(base_s=0.01, per_unit_s=0.001, tail_ratio=1.5)
STEP = ServiceLaw(base_s=0.004, per_unit_s=0.001, tail_ratio=1.2)


def waiting(due: float, rows: int = 1, tokens: int = 1, length: int = 10) -> Waiting[Any]:
    return Waiting(SimpleNamespace(tokens=tokens), due, rows, (length,), 0.0, 0.1)


def queue_of(*tasks: Waiting[Any]) -> DeadlineQueue[Any]:
    queue: DeadlineQueue[Any] = DeadlineQueue(32)
    for task in tasks:
        queue.push(task)
    return queue


def test_an_answer_takes_its_prefill_and_a_step_for_each_further_token() -> None:
    estimate = GenerationEstimate(PREFILL, STEP)
    assert estimate.mean_s(2, 10, 100, 3) == pytest.approx(0.03), "nothing is known of how many tokens there will be"
    estimate.answered(20, 40)
    estimate.answered(40, 40)
    assert estimate.tokens(40) == 30.0
    assert estimate.mean_s(2, 10, 40, 3) == pytest.approx(0.03 + 29 * 0.007)
    assert estimate.tail_s(2, 10, 40, 3) == pytest.approx(0.045 + 29 * 0.007)
    assert estimate.tokens(1) == 1.0


def test_drops_in_a_row_make_the_lengths_be_forgotten() -> None:
    """Otherwise a stage whose first answers were long would drop every task with a short deadline for ever."""
    estimate = GenerationEstimate(PREFILL, STEP)
    for _ in range(64):
        estimate.answered(100, 100)
    dropped = 0
    while True:
        joined, doomed = next_to_join(queue_of(waiting(0.1, tokens=100)), [], 0.0, estimate, 4)
        if joined is not None:
            break
        dropped += len(doomed)
    assert dropped == 64


def test_a_task_past_its_instant_does_not_cast_doubt() -> None:
    estimate = GenerationEstimate(PREFILL, STEP)
    estimate.answered(10, 10)
    next_to_join(queue_of(waiting(-1.0)), [], 0.0, estimate, 4)
    assert estimate.tokens(10) == 10.0


def test_nobody_overtakes_a_task_that_has_no_room_yet() -> None:
    queue = queue_of(waiting(1.0, rows=3), waiting(2.0))
    members = [Member(math.inf, 2, 1.0)]
    assert next_to_join(queue, members, 0.0, GenerationEstimate(PREFILL, STEP), 4) == (None, [])
    assert len(queue) == 2


members = st.builds(Member, st.floats(0.0, 3.0) | st.just(math.inf), st.integers(1, 3), st.floats(1.0, 50.0))
tasks = st.builds(waiting, st.floats(0.0, 5.0), st.integers(1, 4), st.integers(1, 60), st.integers(1, 200))


@given(st.lists(members, max_size=4), st.lists(tasks, max_size=8), st.floats(0.0, 1.0))
def test_who_joins_makes_nobody_late_and_would_be_in_time(there: list[Member], asking: list[Waiting[Any]], now: float) -> None:
    estimate = GenerationEstimate(PREFILL, STEP)
    estimate.answered(1, 1)
    before = GenerationEstimate(PREFILL, STEP)
    before.answered(1, 1)
    queue = queue_of(*asking)
    joining, doomed = next_to_join(queue, there, now, estimate, 8)
    running = sum(member.rows for member in there)
    for task in doomed:
        batch = min(running + task.items, 8)
        assert now + before.tail_s(task.items, task.lengths[0], task.task.tokens, batch) > task.due
    assert len(queue) + len(doomed) + (joining is not None) == len(asking)
    if joining is None:
        return
    together = running + joining.items
    assert together <= 8
    assert joining.due == min(task.due for task in asking if task not in doomed)
    prefill_s = estimate.prefill.mean_s(joining.units)
    for member in there:
        if now + member.steps * estimate.step.mean_s(running) <= member.due:
            assert now + prefill_s + member.steps * estimate.step.mean_s(together) <= member.due
