"""A streamed answer on the wire between our processes: frames, each a whole answer as far as it has come.

    stream  =  frame ... frame end            on one HTTP answer, Transfer-Encoding: chunked, media type below
    frame   =  kind (1 byte) | header length (uint32) | length (uint32) | payload            little-endian

`answer`: an Open Inference Protocol answer, all that the pipeline has made so far; the next one replaces it. `error`: the JSON
error object; nothing follows. `end`: a JSON object with what the generating hop measured; nothing follows. Each answer holds
all tokens so far, not only the new ones: so stages behind the generating one need no memory of a stream, and whoever is slow
may skip frames.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

MEDIA_TYPE = "application/vnd.espalier.stream"
PARAMETER = "stream"
"""Request parameter between our processes (true): answer in frames."""
TOKEN_PARAMETER = "token_timeout"
"""Request parameter beside it: longest time between two tokens that is on time [µs]."""
FRAME_BYTES = 16 << 20
"""Longest payload of a frame."""

Kind = Literal["answer", "error", "end"]
_KINDS: tuple[Kind, ...] = ("answer", "error", "end")
_HEAD = struct.Struct("<BII")
_NO_HEADER = 0xFFFFFFFF


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


def error(body: Mapping[str, Any]) -> bytes:
    """The frame that ends a stream that failed; `body` is `TaskError.body()`."""
    return _encode("error", orjson.dumps(body), None)


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

    @property
    def empty(self) -> bool:
        """Whether nothing of an incomplete frame is left."""
        return not self._buffer
