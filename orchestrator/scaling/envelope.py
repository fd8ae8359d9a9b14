"""Traffic envelopes: how much can come within any window, as network calculus tells of a stream of arrivals.

Source: Cruz 1991 (network calculus); windows that double, as in InferLine (Crankshaw et al., SoCC 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def peak(rates: Sequence[float], width: int) -> float:
    """The largest mean of `width` consecutive rates, or the mean of all where there are fewer; 0 of none."""
    width = min(width, len(rates))
    if not width:
        return 0.0
    sums = [0.0, *accumulate(rates)]
    return max(after - before for before, after in zip(sums, sums[width:], strict=False)) / width


def envelope(rates: Sequence[float]) -> tuple[float, ...]:
    """The `peak` of 1, 2, 4, ... consecutive rates, as far as there are so many."""
    return tuple(peak(rates, 2**i) for i in range(len(rates).bit_length()))
