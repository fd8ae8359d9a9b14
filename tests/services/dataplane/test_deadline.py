"""How a request's budget is read: precedence, units, limits, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dataplane.deadline import ENVOY_HEADER, GRPC_HEADER, TIMEOUT_HEADER, Deadline, read_budget_s, to_parameter
from services.dataplane.errors import BadRequest

DEFAULT_S, MAXIMUM_S = 2.0, 60.0


def budget_s(headers: dict[str, str] | None = None, parameters: dict[str, Any] | None = None) -> float:
    return read_budget_s(headers or {}, parameters or {}, default_s=DEFAULT_S, maximum_s=MAXIMUM_S)


@pytest.mark.parametrize(
    ("headers", "parameters", "expected_s"),
    [
        ({TIMEOUT_HEADER: "0.25"}, {}, 0.25),
        ({TIMEOUT_HEADER: "3"}, {}, 3.0),
        ({TIMEOUT_HEADER: "1e-3"}, {}, 0.001),
        ({GRPC_HEADER: "250m"}, {}, 0.25),
        ({GRPC_HEADER: "3S"}, {}, 3.0),
        ({GRPC_HEADER: "1M"}, {}, 60.0),
        ({GRPC_HEADER: "500000u"}, {}, 0.5),
        ({GRPC_HEADER: "99999999n"}, {}, 0.099999999),
        ({ENVOY_HEADER: "1500"}, {}, 1.5),
        ({ENVOY_HEADER: "0.5"}, {}, 0.0005),
        ({}, {"timeout": 250_000}, 0.25),
        ({}, {"timeout": 1}, 1e-6),
        ({}, {"timeout": 0}, DEFAULT_S),
        ({}, {"timeout": None}, DEFAULT_S),
        ({}, {}, DEFAULT_S),
        ({}, {"priority": 1}, DEFAULT_S),
    ],
)
def test_units(headers: dict[str, str], parameters: dict[str, Any], expected_s: float) -> None:
    assert budget_s(headers, parameters) == pytest.approx(expected_s, rel=1e-12)


def test_the_first_form_present_wins() -> None:
    headers = {TIMEOUT_HEADER: "1", GRPC_HEADER: "2S", ENVOY_HEADER: "3000"}
    parameters = {"timeout": 4_000_000}
    for name, expected_s in ((TIMEOUT_HEADER, 1.0), (GRPC_HEADER, 2.0), (ENVOY_HEADER, 3.0)):
        assert budget_s(headers, parameters) == expected_s
        del headers[name]
    assert budget_s(headers, parameters) == 4.0


def test_a_bad_first_form_is_refused_rather_than_skipped() -> None:
    with pytest.raises(BadRequest):
        budget_s({TIMEOUT_HEADER: "soon", GRPC_HEADER: "2S"}, {"timeout": 1000})


@pytest.mark.parametrize(
    ("headers", "parameters", "default_s"),
    [
        ({TIMEOUT_HEADER: "3600"}, {}, 2.0),
        ({GRPC_HEADER: "99999999H"}, {}, 2.0),
        ({ENVOY_HEADER: "60001"}, {}, 2.0),
        ({}, {"timeout": 2**63}, 2.0),
        ({}, {}, 90.0),
    ],
    ids=["header", "grpc", "envoy", "parameter", "even the default"],
)
def test_the_maximum_cuts_every_form(headers: dict[str, str], parameters: dict[str, Any], default_s: float) -> None:
    assert read_budget_s(headers, parameters, default_s=default_s, maximum_s=MAXIMUM_S) == MAXIMUM_S


@pytest.mark.parametrize(
    "text", ["", " ", "soon", "1s", "-1", "0", "-0.0", "nan", "inf", "-inf", "infinity", "1e999", "1_0", "0x10", "1,5", "٣"]
)
@pytest.mark.parametrize("header", [TIMEOUT_HEADER, ENVOY_HEADER])
def test_headers_that_are_no_positive_time_are_refused_by_name(header: str, text: str) -> None:
    with pytest.raises(BadRequest, match=header):
        budget_s({header: text})


@pytest.mark.parametrize(
    "text",
    ["", "S", "5", "5s", "5 S", "-5S", "+5S", "5.5S", "123456789S", "0S", "00000000n", "٣S", "S5", "1_0S"],
)
def test_grpc_timeouts_outside_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match=GRPC_HEADER):
        budget_s({GRPC_HEADER: text})


@pytest.mark.parametrize(
    "value", [-1, 1.5, 250_000.0, True, "250000", [], [250_000], {}, -(2**63)], ids=lambda value: f"timeout={value!r}"
)
def test_parameters_that_are_no_whole_microseconds_are_refused(value: Any) -> None:
    with pytest.raises(BadRequest, match=r"parameters\.timeout"):
        budget_s(parameters={"timeout": value})


def test_a_refusal_does_not_repeat_a_long_text() -> None:
    with pytest.raises(BadRequest) as refusal:
        budget_s({TIMEOUT_HEADER: "x" * 10_000})
    assert len(str(refusal.value)) < 200


_texts = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"-?[0-9]{1,9}(\.[0-9]{1,3})?(e-?[0-9]{1,3})?[HMSmun]?", fullmatch=True),
)


@given(
    headers=st.dictionaries(st.sampled_from([TIMEOUT_HEADER, GRPC_HEADER, ENVOY_HEADER]), _texts),
    timeout=st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.lists(st.integers())),
)
def test_whatever_is_asked_is_a_positive_time_up_to_the_maximum_or_refused(headers: dict[str, str], timeout: Any) -> None:
    try:
        seconds = budget_s(headers, {"timeout": timeout})
    except BadRequest:
        return
    assert 0 < seconds <= MAXIMUM_S


@given(st.floats(0, 1e6))
def test_remaining_time_passed_on_is_never_longer_than_what_is_left_nor_none(remaining_s: float) -> None:
    microseconds = to_parameter(remaining_s)
    assert microseconds >= 1
    passed_s = budget_s(parameters={"timeout": microseconds})
    assert passed_s <= min(max(remaining_s, 1e-6), MAXIMUM_S) * (1 + 1e-12)
    assert passed_s >= min(remaining_s, MAXIMUM_S) - 1.001e-6


def test_time_that_is_already_over_is_passed_on_as_the_shortest_there_is() -> None:
    assert to_parameter(-3.0) == 1


def test_a_deadline_counts_from_arrival() -> None:
    until = Deadline(arrived=100.0, budget_s=0.25)
    assert until.due == 100.25
    assert math.isclose(until.remaining_s(100.1), 0.15, rel_tol=1e-9)
    assert until.remaining_s(101.0) == -0.75
