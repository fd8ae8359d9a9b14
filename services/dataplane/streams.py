"""A streamed answer between our processes: its pace, and its frames, each a whole answer as far as it has come.

    stream  =  frame ... frame end            on one HTTP answer, Transfer-Encoding: chunked, media type below
    frame   =  kind (1 byte) | header length (uint32) | length (uint32) | payload            little-endian

`answer`: an Open Inference Protocol answer, all that the pipeline has made so far; the next one replaces it. `error`: the JSON
error object and its status; nothing follows. `end`: a JSON object with what the generating hop measured; nothing follows. Each
answer holds all tokens so far, not only the new ones: so stages behind the generating one need no memory of a stream, and
whoever is slow may skip frames.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import orjson

from services.dataplane import errors
from services.dataplane.errors import BadRequest, TaskError

MEDIA_TYPE = "application/vnd.espalier.stream"
PARAMETER = "stream"
"""Parameter of a request with an itinerary: answer in frames, at this pace."""
STALL = 10.0
"""Times the longest gap between tokens after which a stream is given up: nobody reads on in a text that has stopped."""
FRAME_BYTES = 16 << 20
"""Longest payload of a frame."""

Kind = Literal["answer", "error", "end"]
_KINDS: tuple[Kind, ...] = ("answer", "error", "end")
_HEAD = struct.Struct("<BII")
_NO_HEADER = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a stream must come. Times in seconds. The deadline is its first token's, or the `whole` answer's."""

    token_s: float | None
    """Longest time between two tokens that is on time; None where nobody minds."""
    stall_s: float
    """Longest wait for more, after which the stream ends with an error."""
    whole: bool = False
    """Of an answer that is wanted whole, and streamed only so that whoever waits for it can end it."""

    @classmethod
    def of(cls, token_deadline_s: float | None, deadline_s: float) -> Pace:
        """The pace of a pipeline.

        A stream is given up after ten times the longest gap that is on time, or where none is named, after as long as its
        first token might have taken.
        """
        return cls(token_deadline_s, deadline_s if token_deadline_s is None else STALL * token_deadline_s)

    def to_parameter(self) -> dict[str, int | bool | None]:
        """As the next hop reads it [µs]."""
        token = None if self.token_s is None else round(self.token_s * 1e6)
        return {"token": token, "stall": round(self.stall_s * 1e6), "whole": self.whole}

    @classmethod
    def from_parameter(cls, value: Any) -> Pace | None:
        """What `to_parameter` wrote; None where the request asks for no stream.

        Raises:
            BadRequest: it is something else.
        """
        if value is None:
            return None
        fields = value if isinstance(value, dict) else {}
        token, stall, whole = fields.get("token"), fields.get("stall"), fields.get("whole", False)
        if not (_is_time(stall) and (token is None or _is_time(token)) and isinstance(whole, bool)):
            raise BadRequest(f"parameters.{PARAMETER} is malformed; only a gateway makes one, leave it out")
        return cls(None if token is None else token / 1e6, stall / 1e6, whole)


def _is_time(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame. `raw` is the whole of it, to be passed on unread."""

    kind: Kind
    payload: bytes
    header_length: int | None
    """Of an answer: length of its JSON part where tensors follow it."""
    raw: bytes

    def document(self) -> dict[str, Any]:
        """The JSON object of an error or an end.

        Raises:
            ValueError: it is none.
        """
        document = orjson.loads(self.payload)
        if not isinstance(document, dict):
            raise ValueError("a frame holds no object")
        return document


def answer(payload: bytes, header_length: int | None) -> bytes:
    """A frame around an encoded answer."""
    return _encode("answer", payload, header_length)


def error(failure: TaskError) -> bytes:
    """The frame that ends a stream that failed: the error object, with the status it would have had."""
    return _encode("error", orjson.dumps({"status": failure.status, **failure.body()}), None)


def failure(frame: Frame, stage: str) -> TaskError:
    """The error that a frame tells of; `stage` is who told it.

    Raises:
        ValueError: it is no error object.
    """
    body = frame.document()
    status = body.get("status")
    return errors.from_answer(status if isinstance(status, int) else 502, body, stage=stage)


def end(report: Mapping[str, Any]) -> bytes:
    """The frame that ends a whole stream, with the generating hop's last report."""
    return _encode("end", orjson.dumps(report), None)


def _encode(kind: Kind, payload: bytes, header_length: int | None) -> bytes:
    return _HEAD.pack(_KINDS.index(kind), _NO_HEADER if header_length is None else header_length, len(payload)) + payload


class Reader:
    """Frames out of the pieces in which a stream arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Take in a piece; the frames that it completes.

        Raises:
            ValueError: these are no frames, or one is over its limit.
        """
        self._buffer += piece
        while len(self._buffer) >= _HEAD.size:
            kind, header_length, length = _HEAD.unpack_from(self._buffer)
            if kind >= len(_KINDS) or length > FRAME_BYTES:
                raise ValueError("the stream is not made of frames")
            size = _HEAD.size + length
            if len(self._buffer) < size:
                return
            raw = bytes(self._buffer[:size])
            del self._buffer[:size]
            yield Frame(_KINDS[kind], raw[_HEAD.size :], None if header_length == _NO_HEADER else header_length, raw)
