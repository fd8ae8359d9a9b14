"""The base of every document that crosses a process boundary: frozen, and strict about fields it does not know."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """A value parsed from JSON; an unknown field is an error, since it is most often a misspelt one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
