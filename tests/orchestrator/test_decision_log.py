from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import decision_log
from orchestrator.core import (
    Decision,
    Observation,
    PipelineObservation,
    Placement,
    ServiceObservation,
    Signal,
    Target,
)
from orchestrator.decision_log import Begin, CutOff, DecisionLog, Entry, Origin, Slot
from orchestrator.errors import UsageError
from orchestrator.scaling.manual import Manual, ManualState
from orchestrator.scaling.policies import POLICIES
from tests.orchestrator.scaling.test_manual import POLICY, seen

ORIGIN = Origin("small", "0" * 64)
ORDERS: list[dict[str, Target]] = [
    {}, {"encode": Target(3)}, {"encode": Target(3), "pool": Target(2, 0)}, {"encode": Target(9)}, {"encode": Target(1)},
]  # fmt: skip


def write(path: Path, log: DecisionLog | None = None, policy: Manual = POLICY, orders: Sequence[Any] = ORDERS) -> None:
    """A run of as many slots as there are orders."""
    log, state = log or DecisionLog(path, lambda: ORIGIN), policy.initial()
    for i, order in enumerate(orders):
        observation = seen(order, age_s=0.1 + 0.2, t=i / 3)
        after, decision = policy.step(state, observation)
        log.append(Entry(state, observation, decision), policy=policy, wall="2026-01-01T00:00:00+00:00", version=i)
        state = after


def append(log: DecisionLog, t: float = 0.0) -> None:
    log.append(Entry(POLICY.initial(), seen(t=t), Decision(None, "hold: test")), policy=POLICY, wall="", version=1)


def shape(path: Path) -> list[Any]:
    """Headers as `header`, slots as their numbers."""
    found: list[Any] = []
    for _, content in decision_log.read(path):
        found.append(content.slot if isinstance(content, Slot) else "header" if isinstance(content, Begin) else "cut off")
    return found


def problem(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        list(decision_log.read(path))
    return str(error.value)


def test_a_header_holds_the_whole_policy_and_says_for_what_it_decides(tmp_path: Path) -> None:
    write(tmp_path / "log")
    [(line, begin), *_] = decision_log.read(tmp_path / "log")
    assert line == 1
    assert isinstance(begin, Begin)
    assert begin.policy == POLICY
    assert (begin.header.testbed, begin.header.sha256, begin.header.policy) == ("small", "0" * 64, "manual")


def test_slots_count_from_one_and_read_back_as_they_were(tmp_path: Path) -> None:
    write(tmp_path / "log")
    slots = [content for _, content in decision_log.read(tmp_path / "log") if isinstance(content, Slot)]
    assert [slot.slot for slot in slots] == [1, 2, 3, 4, 5]
    assert slots[0].state == ManualState()
    assert slots[2].observation == seen(ORDERS[2], age_s=0.1 + 0.2, t=2 / 3)


def test_a_successor_and_another_policy_write_headers_of_their_own(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", lambda: ORIGIN)
    write(tmp_path / "log", log, orders=ORDERS[:2])
    write(tmp_path / "log", log, replace(POLICY, hold_s=7.0), ORDERS[:2])
    write(tmp_path / "log", orders=ORDERS[:1])
    assert shape(tmp_path / "log") == ["header", 1, 2, "header", 1, 2, "header", 1]
    begins = [content for _, content in decision_log.read(tmp_path / "log") if isinstance(content, Begin)]
    assert begins[1].policy == replace(POLICY, hold_s=7.0)


def test_a_log_that_has_grown_too_long_is_put_aside_and_the_next_file_is_whole_in_itself(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path, lambda: ORIGIN, longest_bytes=100)
    append(log)
    assert not path.exists()
    append(log)
    assert shape(tmp_path / "decisions.jsonl.1") == ["header", 2]


def test_a_log_that_somebody_removed_begins_again_with_a_header(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", lambda: ORIGIN)
    append(log)
    (tmp_path / "log").unlink()
    append(log)
    assert shape(tmp_path / "log") == ["header", 2]


@pytest.mark.parametrize("rest", [b'{"slot": 2, "t"', b"x" * (decision_log.BLOCK_BYTES + 1)])
def test_a_line_cut_off_is_read_as_such_and_mended_by_the_successor(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "log"
    append(DecisionLog(path, lambda: ORIGIN))
    with path.open("ab") as stream:
        stream.write(rest)
    assert [content for _, content in decision_log.read(path)][2:] == [CutOff()]
    append(DecisionLog(path, lambda: ORIGIN))
    assert shape(path) == ["header", 1, "header", 1]


def test_a_header_cut_off_is_mended_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"decision_log": 1, "esp')
    append(DecisionLog(path, lambda: ORIGIN))
    assert shape(path) == ["header", 1]


def test_what_a_full_disk_does_not_take_whole_is_not_written_at_all(tmp_path: Path) -> None:
    """The size limit of files stands for the full disk: the kernel takes a part of the line, then no more."""
    path = tmp_path / "log"
    log = DecisionLog(path, lambda: ORIGIN)
    append(log)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="File too large"):
                append(log)
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append(log)
    assert shape(path) == ["header", 1, 4]


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_what_json_cannot_say_is_refused_and_leaves_the_log_as_it_was(tmp_path: Path, number: float) -> None:
    log = DecisionLog(tmp_path / "log", lambda: ORIGIN)
    append(log)
    with pytest.raises(ValueError, match="JSON compliant"):
        append(log, t=number)
    append(log)
    assert shape(tmp_path / "log") == ["header", 1, 3]


def test_what_is_no_log_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("name: small\n")
    assert problem(path).startswith(f"{path}:1: no header of a decision log")
    append(DecisionLog(path, lambda: ORIGIN))
    header, slot = (tmp_path / "log").read_bytes().splitlines(keepends=True)[1:]

    path.write_bytes(slot)
    assert problem(path).startswith(f"{path}:1: no header")
    path.write_bytes(header + b"{}\n" + slot)
    assert problem(path) == f"{path}:2: slot: Field required"
    path.write_bytes(header + slot[:50] + b"\n" + slot)
    assert problem(path).startswith(f"{path}:2: Invalid JSON")
    path.write_bytes(header + b"\xff\xfe\n")
    assert problem(path).startswith(f"{path}:2: Invalid JSON")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"policy": "tea_leaves"},
            f"there is no policy 'tea_leaves' in this version; it has {', '.join(POLICIES)}",
        ),
        ({"decision_log": 2}, "format 2; this version of espalier reads format 1"),
        ({"testbed": None}, "testbed: Input should be a valid string"),
    ],
)
def test_a_header_that_this_version_does_not_understand_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "log"
    append(DecisionLog(path, lambda: ORIGIN))
    header = json.loads(path.read_bytes().splitlines()[0])
    path.write_text(json.dumps({**header, **change}) + "\n")
    assert problem(path) == f"{path}:1: {said}"


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(DecisionLog(path, lambda: ORIGIN))
    with path.open("r+b") as stream:
        os.truncate(stream.fileno(), decision_log.LONGEST_LINE_BYTES * 3)  # a hole, which reads as zeros
    assert problem(path).startswith(f"{path}:3: Invalid JSON")


names = st.text(max_size=5)
numbers = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | numbers
counts = st.integers(0, 2**63 - 1)
placements = st.builds(
    Placement,
    *[st.dictionaries(names, st.dictionaries(names, counts, max_size=2), max_size=2) for _ in ("ready", "standby")],
)
replicas = st.dictionaries(
    names, st.dictionaries(st.sampled_from(["starting", "standby", "ready", "draining"]), counts, max_size=4), max_size=2
)
signals = st.builds(Signal, numbers, maybe, maybe, maybe, maybe, maybe)
observations = st.builds(
    Observation,
    numbers,
    st.dictionaries(names, st.builds(ServiceObservation, replicas, st.none() | signals), max_size=2),
    st.dictionaries(
        names, st.builds(PipelineObservation, numbers, numbers, st.dictionaries(names, numbers, max_size=2)), max_size=2
    ),
    st.dictionaries(names, st.builds(Target, counts, counts), max_size=2),
)
entries = st.builds(
    Entry, st.builds(ManualState, st.none() | placements), observations, st.builds(Decision, st.none() | placements, names)
)


@given(entries)
def test_every_state_observation_and_decision_survives_the_log_exactly(
    tmp_path_factory: pytest.TempPathFactory, entry: Entry[ManualState]
) -> None:
    """`repr` tells 0.0 from -0.0 and keeps the order of mappings, which `==` does not."""
    path = tmp_path_factory.getbasetemp() / "survives"
    path.unlink(missing_ok=True)
    DecisionLog(path, lambda: ORIGIN).append(entry, policy=POLICY, wall="", version=1)
    [_, (_, slot)] = decision_log.read(path)
    assert isinstance(slot, Slot)
    assert repr(Entry(slot.state, slot.observation, slot.decision)) == repr(entry)
