"""Types of policy parameters that JSON has no shape for. A policy annotated with them survives JSON exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, PlainSerializer

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")


def _to_rows(mapping: Mapping[Any, Any]) -> list[list[Any]]:
    return [[key, value] for key, value in mapping.items()]


def _from_rows(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if any(not isinstance(row, list) or len(row) != 2 for row in value):
        raise ValueError("must be rows of a key and a value")
    return {tuple(key) if isinstance(key, list) else key: found for key, found in value}


def _in_order(values: Iterable[Any]) -> list[Any]:
    return sorted(values)


Table = Annotated[Mapping[K, V], PlainSerializer(_to_rows), BeforeValidator(_from_rows)]
"""A mapping whose keys are tuples: `[[["a", "b"], 0.1], …]`, in the mapping's own order."""

Ordered = Annotated[frozenset[T], PlainSerializer(_in_order)]
"""A set, written in order: equal parameters give equal text, whatever the order in memory."""
