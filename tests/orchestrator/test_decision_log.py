from __future__ import annotations

import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from orchestrator import decision_log
from orchestrator.core import Decision, Observation, Placement, Signal, Target
from orchestrator.decision_log import DecisionLog, Entry
from orchestrator.scaling.manual import Manual, ManualState
from tests.orchestrator.scaling.test_manual import POLICY, seen

ORDERS = [{}, {"encode": Target(3)}, {"encode": Target(3), "pool": Target(2, 0)}, {"encode": Target(9)}, {"encode": Target(1)}]


def write(path: Path) -> None:
    """A run of five slots whose operator changes his mind in each."""
    log, state = DecisionLog(path, ManualState), POLICY.initial()
    for i, orders in enumerate(ORDERS):
        observation = seen(orders, age_s=0.1 + 0.2, t=i / 3)
        after, decision = POLICY.step(state, observation)
        log.append(Entry(state, observation, decision), wall="2026-01-01T00:00:00+00:00", version=i)
        state = after


def test_a_log_decided_again_gives_the_same_decisions_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path / "decisions.jsonl")
    assert decision_log.replay(tmp_path / "decisions.jsonl", POLICY) == decision_log.Replay(5, ())


def test_another_policy_is_seen_to_decide_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "decisions.jsonl")
    other = Manual(POLICY.services, POLICY.nodes, {"encode": Target(1), "pool": Target(1, 1)})
    differences = decision_log.replay(tmp_path / "decisions.jsonl", other).differences
    assert [difference.line for difference in differences] == [1]
    assert differences[0].replayed.reason == "new order: encode 1, pool 1+1"


def test_the_states_of_a_log_follow_from_each_other(tmp_path: Path) -> None:
    write(tmp_path / "decisions.jsonl")
    entries = list(decision_log.read(tmp_path / "decisions.jsonl", ManualState))
    for entry, following in itertools.pairwise(entries):
        assert POLICY.step(entry.state, entry.observation)[0] == following.state


def test_a_log_that_has_grown_too_long_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path, ManualState, longest_bytes=100)
    for _ in range(2):
        log.append(Entry(POLICY.initial(), seen(), Decision(None, "hold: test")), wall="", version=1)
    assert not path.exists()
    assert len(path.with_name("decisions.jsonl.1").read_text().splitlines()) == 1


numbers = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | numbers
placed = st.dictionaries(st.text(max_size=5), st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=2), max_size=2)


@given(st.builds(Signal, numbers, maybe, maybe, maybe, maybe, maybe), st.builds(Placement, placed, placed), numbers)
def test_every_value_survives_json_exactly(signal: Signal, placement: Placement, t: float) -> None:
    for value in (signal, placement, Decision(placement, "why"), Observation(t, {}, orders={"s": Target(1, 2)})):
        adapter = TypeAdapter[object](type(value))
        assert adapter.validate_json(adapter.dump_json(value)) == value
