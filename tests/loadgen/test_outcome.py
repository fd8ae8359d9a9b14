from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.outcome import OUTCOMES, Hop, Outcome, TaskRecord, classify, hops_of

seconds = st.floats(0, 1e6)


@pytest.mark.parametrize(
    ("status", "latency_s", "problem", "given_up", "outcome"),
    [
        (200, 0.1, None, False, "on_time"),
        (200, 0.3, None, False, "on_time"),  # exactly at the deadline
        (200, 0.3000001, None, False, "late"),
        (200, 0.1, "bad_answer", False, "failed"),
        (504, 0.1, None, False, "expired"),
        (504, 0.9, None, False, "expired"),
        (429, 0.1, None, False, "rejected"),
        (503, 0.1, None, False, "rejected"),
        (400, 0.1, None, False, "failed"),
        (500, 0.1, None, False, "failed"),
        (204, 0.1, None, False, "failed"),
        (None, None, "disconnected", False, "failed"),
        (None, None, "not_sent", False, "failed"),
        (None, None, None, False, "failed"),
        (None, None, None, True, "cancelled"),
    ],
)
def test_each_ending_has_its_outcome(
    status: int | None, latency_s: float | None, problem: str | None, given_up: bool, outcome: Outcome
) -> None:
    assert classify(status, latency_s, 0.3, problem=problem, given_up=given_up) == outcome


@given(st.none() | st.integers(100, 599), st.none() | seconds, seconds, st.none() | st.text(min_size=1), st.booleans())
def test_everything_ends_in_exactly_one_outcome(
    status: int | None, latency_s: float | None, deadline_s: float, problem: str | None, given_up: bool
) -> None:
    outcome = classify(status, latency_s, deadline_s, problem=problem, given_up=given_up)
    assert OUTCOMES.count(outcome) == 1
    assert (outcome == "cancelled") == given_up
    if outcome in {"on_time", "late"}:
        assert status == 200
        assert problem is None


def record(**changes: Any) -> TaskRecord:
    fields: dict[str, Any] = {
        "pipeline": "embed", "index": 0, "scheduled_s": 1.0, "sent_s": 1.25, "finished_s": 1.5, "deadline_s": 0.3,
        "status": 200, "reason": None, "outcome": "late",
    }  # fmt: skip
    return TaskRecord(**{**fields, **changes})


def test_latency_and_lag_count_from_the_scheduled_send() -> None:
    assert record().latency_s == 0.5
    assert record().send_lag_s == 0.25
    assert record(sent_s=None, finished_s=None).latency_s is None
    assert record(sent_s=None, finished_s=None).send_lag_s is None


def test_a_record_is_one_json_object() -> None:
    hop = Hop("encode", "encode-a", "a0", "n0", 0.1, 0.2, 0.3, 4)
    document = json.loads(json.dumps(record(hops=(hop,)).as_dict()))
    assert document["latency_s"] == 0.5
    assert document["hops"][0]["service"] == "encode-a"
    assert document["outcome"] == "late"


HOP = {"step": "s", "service": "v", "replica": "r", "node": "n", "queue_s": 1, "compute_s": 2, "transfer_s": 3.5, "batch": 2}


def test_hops_are_read_as_the_server_told_them() -> None:
    (hop,) = hops_of([HOP])
    assert hop == Hop("s", "v", "r", "n", 1.0, 2.0, 3.5, 2)
    assert hop.total_s == 6.5


def test_the_hops_that_have_times_are_kept_among_those_that_have_none() -> None:
    assert [hop.step for hop in hops_of([HOP, {"step": "dropped", "service": "v"}, {**HOP, "step": "t"}])] == ["s", "t"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "hops",
        {},
        [],
        [1],
        [{}],
        [None],
        ["hop"],
        [{"step": "s", "service": "v", "total_s": 0.1}],  # a stage that dropped the task before computing
        [{**HOP, "queue_s": "long"}],
        [{**HOP, "queue_s": None}],
        [{**HOP, "compute_s": float("nan")}],
        [{**HOP, "batch": float("inf")}],
    ],
)
def test_what_is_no_hop_is_no_timing(value: object) -> None:
    assert hops_of(value) == ()
