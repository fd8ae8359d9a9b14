"""Multipart forms: what clients send, and what they should not."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dataplane.errors import BadRequest, TooLarge
from services.gateway import forms

TYPE = "multipart/form-data; boundary=xyz"


def part(name: str, value: bytes, more: str = "") -> bytes:
    return b'--xyz\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name.encode(), more.encode(), value)


def test_fields_and_files_come_out_byte_by_byte() -> None:
    sound = bytes(range(256)) + b"\r\n--xy\r\n--"
    body = part("model", b"hear") + part("file", sound, '; filename="a.wav"\r\nContent-Type: audio/wav') + b"--xyz--\r\n"
    assert forms.read(TYPE, body) == {"model": b"hear", "file": sound}


@given(st.binary(max_size=60))
def test_any_bytes_are_a_form_or_a_bad_request(body: bytes) -> None:
    for whole in (body, part("a", body) + b"--xyz--", b"--xyz\r\n" + body):
        with contextlib.suppress(BadRequest, TooLarge):
            assert forms.read(TYPE, whole)


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("application/json", b"{}", "must be multipart/form-data"),
        ("multipart/form-data", b"", "with a boundary"),
        ("", b"", "must be multipart/form-data"),
        (TYPE, b"nonsense", "the form is broken"),
        (TYPE, b"", "no complete field"),
        (TYPE, part("a", b"1") + part("a", b"2") + b"--xyz--", "two fields 'a'"),
        (TYPE, b"--xyz\r\nX: y\r\n\r\n1\r\n--xyz--", "a field without a name"),
    ],
)
def test_what_is_no_form_is_refused_and_fills_no_log(
    kind: str, body: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BadRequest, match=words):
        forms.read(kind, body)
    assert not caplog.records


def test_a_form_has_a_bounded_number_of_fields() -> None:
    with pytest.raises(TooLarge, match="more than 32 fields"):
        forms.read(TYPE, b"".join(part(str(i), b"") for i in range(33)) + b"--xyz--")
