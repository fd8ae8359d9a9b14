"""What verifying comes to: one figure per comparison, and the verdict over all of them; and the measures they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.manifest import Manifest, Precision

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Figure:
    """One comparison and its verdict."""

    precision: Precision
    what: str
    value: float
    """The worst over all items, or the count."""
    mean: float
    """The mean over all items."""
    tolerance: float
    count: int
    """Items compared."""

    @property
    def ok(self) -> bool:
        """Whether the worst is within the tolerance; NaN is not."""
        return self.value <= self.tolerance


@dataclass(frozen=True)
class Verdict:
    """What verifying came to."""

    manifest: Manifest
    reference: str
    """Source of the checkpoint compared with."""
    figures: tuple[Figure, ...]

    @property
    def ok(self) -> bool:
        """Whether every figure is within its tolerance."""
        return all(figure.ok for figure in self.figures)


def worst(precision: Precision, what: str, values: Sequence[float], tolerance: float) -> Figure:
    """The figure of a difference measured on every item."""
    return Figure(precision, what, float(np.max(values)), float(np.mean(values)), tolerance, len(values))


def counted(precision: Precision, what: str, differ: Sequence[bool]) -> Figure:
    """The figure of something that must be the same for every item: how many differ."""
    return Figure(precision, what, float(np.sum(differ)), float(np.mean(differ)), 0.0, len(differ))


def apart(a: Array, b: Array) -> Array:
    """Largest absolute difference of each row with its counterpart; shapes (batch, ...), result (batch,)."""
    result: Array = np.abs(a - b).reshape(len(a), -1).max(axis=1, initial=0.0)
    return result


def apart_at(mask: Array, a: Array, b: Array) -> Array:
    """As `apart`, of the positions where the mask (batch, seq) is 1 alone; shapes (batch, seq, width)."""
    result: Array = np.where(mask == 1, np.abs(a - b).max(axis=2), 0).max(axis=1)
    return result


def angle(a: Array, b: Array) -> Array:
    """1 - cosine of each row with its counterpart; shapes (batch, ...), result (batch,)."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Array = 1.0 - (a * b).sum(axis=1) / norms
    return result


def measure(precision: Precision) -> tuple[Callable[[Array, Array], Array], str]:
    """How far answers in this precision are from the whole model's: the measure of each row, and what it is called."""
    return (apart, "largest difference") if precision == "float32" else (angle, "1 - cosine")
