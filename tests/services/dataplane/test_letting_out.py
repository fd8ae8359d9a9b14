from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dataplane.letting_out import introduce, is_due
from services.dataplane.routing import RouteBook

seconds = st.floats(0.0, 10.0)


def test_a_wait_beyond_a_quarter_of_a_hops_slack_is_due() -> None:
    assert is_due(0.026, slack_s=0.2, hops=2)
    assert not is_due(0.025, slack_s=0.2, hops=2)
    assert not is_due(0.026, slack_s=0.2, hops=2, share=1.0)
    assert is_due(0.11, slack_s=0.2, hops=4, share=2.0)
    assert not is_due(0.19, slack_s=0.2, hops=1, share=2.0)
    assert is_due(0.21, slack_s=0.2, hops=1, share=2.0), "more than all the slack is always too much"


def test_a_task_without_slack_lets_out_for_any_wait_but_none() -> None:
    assert is_due(1e-6, slack_s=-0.1, hops=1)
    assert not is_due(0.0, slack_s=-0.1, hops=1)


@given(wait_s=seconds, more_s=seconds, slack_s=seconds, less_s=seconds, hops=st.integers(1, 9))
def test_longer_waits_and_less_slack_are_never_less_due(
    wait_s: float, more_s: float, slack_s: float, less_s: float, hops: int
) -> None:
    assert is_due(wait_s + more_s, slack_s - less_s, hops) >= is_due(wait_s, slack_s, hops)


def test_a_standby_that_was_never_heard_of_is_taken_to_be_as_fast_as_the_others() -> None:
    book = RouteBook()
    book.answered("ready", 1.0, wait_s=0.3, service_s=0.1, transfer_s=0.002)
    introduce(book, "standby", "ready")
    book.sent("standby", 1.0)
    book.sent("standby", 1.0)
    assert book.view("standby").expected_wait_s(1.0) == pytest.approx(0.2), "or the whole burst would go to it"
    book.answered("standby", 1.1, wait_s=0.0, service_s=0.1, transfer_s=0.004)
    introduce(book, "standby", "ready")
    assert book.view("standby").transfer_s > 0.002, "what it says itself counts more"
