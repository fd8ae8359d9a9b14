"""The itinerary as a parameter: it survives the wire, and anybody else's is refused rather than walked."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dataplane.errors import BadRequest
from services.dataplane.itinerary import (
    HEADER,
    MAX_HOPS,
    TOTAL_HEADER,
    Candidate,
    Further,
    Hop,
    from_parameter,
    headers,
    read_header,
    to_parameter,
)

ENCODE = Hop(
    step="encode",
    service="encode-a",
    candidates=(Candidate("encode-a-0", "http://n0:1/v2/models/encode-a"), Candidate("encode-a-1", "http://n1:1")),
    take={"input_ids": "tokenise.input_ids"},
    keep=("encode.last_hidden_state", "tokenise.attention_mask"),
    reserve_s=0.0125,
)
POOL = Hop("pool", "pool-a", (Candidate("pool-a-0", "http://n0:2"),), {"x": "encode.last_hidden_state"}, ("pool.y",), 0.0)


def test_an_itinerary_survives_the_wire_but_for_the_candidates_of_the_hop_it_travels_to() -> None:
    arrived = from_parameter(orjson.loads(orjson.dumps(to_parameter((ENCODE, POOL)))))
    assert arrived[0] == Hop(ENCODE.step, ENCODE.service, (), ENCODE.take, ENCODE.keep, ENCODE.reserve_s)
    assert arrived[1:] == (POOL,)


_texts = st.text(max_size=6)
_hops = st.builds(
    Hop,
    step=_texts,
    service=_texts,
    candidates=st.lists(st.builds(Candidate, _texts, _texts), max_size=3).map(tuple),
    take=st.dictionaries(_texts, _texts, max_size=3),
    keep=st.lists(_texts, max_size=3).map(tuple),
    reserve_s=st.floats(0, 600),
    parts=st.lists(
        st.builds(Further, _texts, st.lists(st.builds(Candidate, _texts, _texts), max_size=2).map(tuple)), max_size=2
    ).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_hops, min_size=1, max_size=4))
def test_any_itinerary_survives_the_wire(hops: list[Hop]) -> None:
    arrived = from_parameter(orjson.loads(orjson.dumps(to_parameter(tuple(hops)))))
    assert [(h.step, h.service, h.take, h.keep) for h in arrived] == [(h.step, h.service, h.take, h.keep) for h in hops]
    assert [h.parts for h in arrived] == [h.parts for h in hops]
    assert [h.candidates for h in arrived] == [(), *(h.candidates for h in hops[1:])]
    assert [h.reserve_s for h in arrived] == pytest.approx([h.reserve_s for h in hops], abs=1e-6)


GOOD: list[dict[str, Any]] = to_parameter((ENCODE, POOL))


@pytest.mark.parametrize("value", [None, "x", 7, True, {}, [], [None], [7], ["x"], [[]], [{}], GOOD * MAX_HOPS])
def test_what_is_no_list_of_hops_is_refused(value: Any) -> None:
    with pytest.raises(BadRequest, match="itinerary"):
        from_parameter(value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, None) for field in GOOD[0]),
        ("step", 7),
        ("service", ["a"]),
        ("take", []),
        ("take", "ab"),
        ("take", {"x": 7}),
        ("keep", "ab"),
        ("keep", {"a": 1}),
        ("keep", [7]),
        ("candidates", "ab"),
        ("candidates", ["ab"]),
        ("candidates", [["one"]]),
        ("candidates", [["a", "b", "c"]]),
        ("candidates", [["a", 7]]),
        ("candidates", [[["a"], "b"]]),
        ("candidates", {"ab": 1}),
        ("reserve_s", "0.1"),
        ("reserve_s", "nan"),
        ("reserve_s", True),
        ("reserve_s", []),
        ("reserve_s", -0.001),
        ("reserve_s", float("nan")),
        ("reserve_s", float("inf")),
    ],
)
def test_hops_of_the_wrong_make_are_refused(field: str, value: Any) -> None:
    spoiled = copy.deepcopy(GOOD)
    spoiled[1][field] = value
    with pytest.raises(BadRequest, match="only a gateway makes one"):
        from_parameter(spoiled)


@pytest.mark.parametrize("field", list(GOOD[0]))
def test_every_field_is_needed(field: str) -> None:
    spoiled = copy.deepcopy(GOOD)
    del spoiled[0][field]
    with pytest.raises(BadRequest):
        from_parameter(spoiled)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.fixed_dictionaries({field: st.just(GOOD[0][field]) | _json for field in GOOD[0]}), max_size=3) | _json)
def test_whatever_comes_is_an_itinerary_or_a_bad_request(value: Any) -> None:
    try:
        hops = from_parameter(value)
    except BadRequest:
        return
    assert from_parameter(to_parameter(hops))[0].step == hops[0].step


REPORT = {"step": "pool", "replica": "pool-0", "node": "k\u00f6ln", "total_s": 0.25}


def test_reports_travel_in_headers_and_the_way_is_what_the_next_hop_did_not_see() -> None:
    last = dict(headers(REPORT, None))
    first = dict(headers({"replica": "encode-0", "total_s": 0.75, "call_s": 0.375}, last[HEADER.encode()].decode("latin-1")))
    assert float(first[TOTAL_HEADER.encode()]) == 0.75
    assert read_header(first[HEADER.encode()].decode("latin-1")) == [
        {"replica": "encode-0", "total_s": 0.75, "call_s": 0.375},
        {**REPORT, "transfer_s": 0.125},
    ]


@pytest.mark.parametrize(
    "value", [None, "", "{}", "[7]", '[{"replica": 7}]', '[{"replica": "a", "total_s": "b"}]', "[", "\xff"]
)
def test_a_header_of_nonsense_is_a_value_error(value: str | None) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read_header(value)


@pytest.mark.parametrize("parts", [7, [7], [["a"]], [["a", [["b"]]]], [["a", [["b", 1]]]], [[1, []]]])
def test_parts_that_no_gateway_wrote_are_refused(parts: Any) -> None:
    with pytest.raises(BadRequest, match="malformed"):
        from_parameter([{**GOOD[0], "parts": parts}])
