"""The base of every document that crosses a process boundary: frozen, and strict about fields it does not know."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """A value parsed from JSON; an unknown field is an error, since it is most often a misspelt one."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def keep(path: Path, text: str) -> None:
    """Write a file in one step, with its directory: whoever reads meanwhile finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
