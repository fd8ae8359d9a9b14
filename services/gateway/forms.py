"""A multipart/form-data body taken apart, in memory: the server has bounded it by then."""

from __future__ import annotations

import logging
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from services.dataplane.errors import BadRequest, TooLarge

MAX_FIELDS = 32

# What is wrong with a form is told to whoever sent it; in the log anybody could write as much of it as they like.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


class _Parts:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.fields: dict[str, bytes] = {}
        self._name = b""
        self._value = b""
        self._disposition = b""
        self._data: list[bytes] = []

    def callbacks(self) -> Any:
        """As the parser calls them."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_name(data[start:end]),
            "on_header_value": lambda data, start, end: self._add_value(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_part_end": self._end,
        }

    def _begin(self) -> None:
        self._name = self._value = self._disposition = b""
        self._data = []

    def _add_name(self, piece: bytes) -> None:
        self._name += piece

    def _add_value(self, piece: bytes) -> None:
        self._value += piece

    def _header(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _end(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode(errors="replace")
        if not name or name in self.fields:
            raise BadRequest(f"the form has {'two fields ' + repr(name[:40]) if name else 'a field without a name'}")
        if len(self.fields) >= MAX_FIELDS:
            raise TooLarge(f"the form has more than {MAX_FIELDS} fields")
        self.fields[name] = b"".join(self._data)


def read(content_type: str, body: bytes) -> dict[str, bytes]:
    """The fields of a form by name, files as their bytes.

    Raises:
        BadRequest: it is no multipart form, broken, or has a field twice.
        TooLarge: more than MAX_FIELDS fields.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest("the body must be multipart/form-data with a boundary")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"the form is broken: {error}") from None
    if not parts.fields:
        raise BadRequest("the form has no complete field")
    return parts.fields
