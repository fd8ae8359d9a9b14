"""Where a stack of layers is cut: into parts of about equal work, at the boundaries between layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from models.errors import UnsupportedCheckpoint


def work(module: Any) -> int:
    """Multiplications a module does per position: the weights of its matrices. Tables that are looked up in cost nothing."""
    from torch import nn  # noqa: PLC0415

    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear | nn.Conv1d | nn.Conv2d))


def split(costs: Sequence[float], parts: int, before: float = 0.0, after: float = 0.0) -> list[range]:
    """Consecutive layers of each part, such that the most expensive part costs as little as it can.

    Args:
        costs: Of each layer, in any unit.
        parts: How many, each of at least one layer.
        before: What the first part does besides its layers (embedding patches).
        after: What the last part does besides (a head over the vocabulary).

    Raises:
        UnsupportedCheckpoint: fewer layers than parts.
    """
    if len(costs) < parts:
        raise UnsupportedCheckpoint(f"{len(costs)} layers cannot be cut into {parts} parts; ask for {len(costs)} at most")

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Cost of the worst part from layer `start` on, and where the `left` parts end."""
        here = before if start == 0 else 0.0
        if left == 1:
            return here + sum(costs[start:]) + after, (len(costs),)
        options = []
        for end in range(start + 1, len(costs) - left + 2):
            rest, ends = best(end, left - 1)
            options.append((max(here + sum(costs[start:end]), rest), (end, *ends)))
        return min(options)

    ends = best(0, parts)[1]
    return [range(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]


def part_name(name: str, index: int, parts: int) -> str:
    """Name of a stage's part: NAME-1, NAME-2, ..., or NAME where it is whole."""
    return name if parts == 1 else f"{name}-{index + 1}"
