from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.presence import AVOID_AFTER, AVOID_S, MOST_DOUBLINGS, Presence, Rules, avoided, step

RULES = Rules(grace_s=10.0, settle_s=20.0)
DOWN: frozenset[str] = frozenset({"box"})
UP: frozenset[str] = frozenset()


def after(*seen: tuple[float, frozenset[str]], rules: Rules = RULES) -> Presence:
    presence = Presence()
    for t, down in seen:
        presence = step(presence, t, down, rules)
    return presence


def test_a_node_that_is_down_gets_nothing_at_once_and_is_planned_without_after_the_grace_time() -> None:
    assert after((0.0, DOWN)).absent == DOWN
    assert after((0.0, DOWN), (9.9, DOWN)).away == UP
    assert after((0.0, DOWN), (10.0, DOWN)).away == DOWN


def test_one_that_is_back_within_the_grace_time_has_moved_nothing() -> None:
    presence = after((0.0, DOWN), (9.0, UP))
    assert (presence.absent, presence.away) == (UP, UP)


def test_one_that_was_away_is_taken_back_only_after_it_has_stayed_up() -> None:
    back = ((0.0, DOWN), (10.0, DOWN), (50.0, UP))
    assert after(*back, (69.9, UP)).away == DOWN
    assert after(*back, (70.0, UP)).absent == UP


def test_one_that_goes_away_again_is_waited_for_twice_as_long() -> None:
    again = ((0.0, DOWN), (10.0, DOWN), (50.0, UP), (60.0, DOWN), (61.0, UP))
    assert after(*again, (100.9, UP)).away == DOWN
    assert after(*again, (101.0, UP)).away == UP


def test_one_that_has_held_for_long_is_as_good_as_new() -> None:
    back = ((0.0, DOWN), (10.0, DOWN), (50.0, UP), (70.0, UP))
    assert after(*back).nodes["box"].losses == 1
    assert after(*back, (270.0, UP)).nodes == {}


seconds = st.floats(0.1, 40.0)


@given(gaps=st.lists(st.tuples(seconds, st.booleans()), max_size=60))
def test_no_rule_is_broken_whatever_the_node_does(gaps: list[tuple[float, bool]]) -> None:
    """It gets nothing while it is down; it is away only after the grace time, and back only after the wait."""
    presence, t, since = Presence(), 0.0, 0.0
    was_down = False
    for gap, down in gaps:
        if down != was_down:
            since, was_down = t, down
        end = t + gap
        while t < end:
            before, presence = presence, step(presence, t, DOWN if down else UP, RULES)
            if down:
                assert presence.absent == DOWN
            if presence.away and not before.away:
                assert down
                assert t - since >= RULES.grace_s
            if before.away and not presence.away:
                assert not down
                assert t - since >= RULES.settle_s
            t += 0.5


@given(period=st.floats(1.0, 100.0), duty=st.floats(0.05, 0.95))
def test_a_node_that_flaps_for_ever_is_planned_anew_ever_more_seldom(period: float, duty: float) -> None:
    presence, changes, away = Presence(), 0, UP
    for i in range(4000):
        t = 0.5 * i
        presence = step(presence, t, DOWN if (t / period) % 1.0 < duty else UP, RULES)
        changes += presence.away != away
        away = presence.away
    # Taken back k times, with no more than FORGIVEN waits between two losses: the waits alone bound how often.
    waits = list(itertools.accumulate(RULES.settle_s * 2 ** min(k, MOST_DOUBLINGS) for k in range(100)))
    assert changes <= 2 * sum(wait <= 2000.0 for wait in waits) + 2


def test_a_place_is_avoided_for_a_while_after_several_failures_in_a_row() -> None:
    place = ("encode", "box")
    assert avoided({}, 0.0, {place: AVOID_AFTER - 1}) == {}
    found = avoided({}, 0.0, {place: AVOID_AFTER})
    assert found == {place: AVOID_S}
    assert avoided(found, AVOID_S - 1.0, {}) == found, "what is not tried any more does not fail any more"
    assert avoided(found, AVOID_S, {}) == {}
    assert avoided(found, 10.0, {place: AVOID_AFTER + 1}) == {place: 10.0 + AVOID_S}
