"""Frames between bytes and answers, however the bytes are cut; and the pace of a stream in a request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dataplane import streams
from services.dataplane.errors import BadRequest, Expired, UpstreamFailed
from services.dataplane.streams import FRAME_BYTES, Pace, Reader


@given(st.lists(st.tuples(st.binary(max_size=40), st.none() | st.integers(0, 40)), max_size=5), st.data())
def test_frames_come_out_whole_however_they_are_cut(answers: list[tuple[bytes, int | None]], data: st.DataObject) -> None:
    sent = b"".join(streams.answer(*each) for each in answers) + streams.end({"replica": "a"})
    reader, found = Reader(), []
    while sent:
        size = data.draw(st.integers(1, len(sent)))
        found += list(reader.feed(sent[:size]))
        sent = sent[size:]
    assert [(frame.payload, frame.header_length) for frame in found[:-1]] == answers
    assert [frame.kind for frame in found] == ["answer"] * len(answers) + ["end"]
    assert found[-1].document() == {"replica": "a"}
    assert b"".join(frame.raw for frame in found) == b"".join(streams.answer(*each) for each in answers) + found[-1].raw


def test_an_error_comes_back_as_what_it_was() -> None:
    raw = streams.error(Expired("too late", stage="generate", reason="expired"))
    (frame,) = Reader().feed(raw)
    error = streams.failure(frame, "tokenise")
    assert isinstance(error, Expired)
    assert (str(error), error.stage, error.reason) == ("too late", "generate", "expired")
    (frame,) = Reader().feed(raw.replace(b'"status":504', b'"status":[1]'))
    assert isinstance(streams.failure(frame, "tokenise"), UpstreamFailed)


@pytest.mark.parametrize(
    "nonsense", [b"\x07" + b"\0" * 8, b"<html>..", b"\0\0\0\0\0" + (FRAME_BYTES + 1).to_bytes(4, "little")]
)
def test_what_is_no_stream_is_noticed_at_once(nonsense: bytes) -> None:
    with pytest.raises(ValueError, match="not made of frames"):
        list(Reader().feed(nonsense.ljust(9, b"x")))


def test_an_end_must_be_an_object() -> None:
    (frame,) = Reader().feed(streams.end({}).replace(b"{}", b"[]"))
    with pytest.raises(ValueError, match="no object"):
        frame.document()


@pytest.mark.parametrize(("token_deadline_s", "deadline_s", "pace"), [(0.2, 5.0, Pace(0.2, 2.0)), (None, 5.0, Pace(None, 5.0))])
def test_a_pace_survives_the_wire(token_deadline_s: float | None, deadline_s: float, pace: Pace) -> None:
    assert Pace.of(token_deadline_s, deadline_s) == pace
    whole = Pace(pace.token_s, pace.stall_s, whole=True)
    for each in (pace, whole):
        assert Pace.from_parameter(each.to_parameter()) == each
    assert Pace.from_parameter({"stall": 5_000_000}) == Pace(None, 5.0), "of a gateway that knows no others"
    assert Pace.from_parameter(None) is None


@pytest.mark.parametrize(
    "value",
    [True, 1, {}, {"stall": 0}, {"stall": 1.5}, {"stall": True}, {"stall": 9, "token": 0}, {"stall": 9, "whole": 1}, []],
)
def test_a_pace_that_no_gateway_wrote_is_refused(value: Any) -> None:
    with pytest.raises(BadRequest, match="only a gateway makes one"):
        Pace.from_parameter(value)
