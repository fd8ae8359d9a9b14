from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.simulator.kernel import URGENT, Kernel


def test_events_happen_in_order_of_time_then_priority_then_planning() -> None:
    kernel, happened = Kernel(), list[str]()
    kernel.at(2.0, happened.append, "late")
    kernel.at(1.0, happened.append, "first planned")
    kernel.at(1.0, happened.append, "second planned")
    kernel.at(1.0, happened.append, "urgent", URGENT)
    kernel.run(3.0)
    assert happened == ["urgent", "first planned", "second planned", "late"]
    assert kernel.now == 3.0
    assert kernel.events == 4


def test_what_an_event_plans_for_now_happens_in_the_same_run() -> None:
    kernel, happened = Kernel(), list[float]()

    def again(times: int) -> None:
        happened.append(kernel.now)
        if times:
            kernel.at(kernel.now, again, times - 1)

    kernel.at(1.0, again, 2)
    kernel.run(1.0)
    assert happened == [1.0, 1.0, 1.0]


def test_a_run_stops_at_its_end_and_goes_on_later() -> None:
    kernel, happened = Kernel(), list[str]()
    kernel.at(1.0, happened.append, "at the end")
    kernel.at(1.5, happened.append, "after it")
    kernel.run(1.0)
    assert happened == ["at the end"]
    assert len(kernel) == 1
    assert kernel.step()
    assert (happened, kernel.now) == (["at the end", "after it"], 1.5)
    assert not kernel.step()


@pytest.mark.parametrize("time", [0.5, float("nan"), float("inf")])
def test_nothing_is_planned_for_the_past_or_for_never(time: float) -> None:
    kernel = Kernel()
    kernel.run(1.0)
    with pytest.raises(ValueError, match=r"it is 1\.0 s now"):
        kernel.at(time, print)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), max_size=50))
def test_the_order_is_that_of_a_stable_sort(plan: list[tuple[int, int]]) -> None:
    kernel, happened = Kernel(), list[int]()
    for i, (time, priority) in enumerate(plan):
        kernel.at(time, happened.append, i, priority)
    kernel.run(10)
    assert happened == sorted(range(len(plan)), key=lambda i: plan[i])
