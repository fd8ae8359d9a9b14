"""How long a batch will take: a line measured at warm-up, corrected by every batch that follows.

Batching, dropping and predicted waits all rest on this one estimate. It is a pure state machine: sizes and seconds in.
"""

from __future__ import annotations

import math
from collections import deque

from models.manifest import ServiceLaw

WINDOW = 64
"""Batches the correction looks back on: a few seconds of load, so that it follows a neighbour taking half of the cores."""
TAIL = 0.95
_REFRESH = 8
"""Batches between two looks at the quantile: sorting 64 floats per batch would cost more than a light stage's work."""


class ServiceEstimate:
    """Mean and 95 % quantile of a batch's service time: law(u) x ratio, the ratio taken over the last batches.

    Units u are those of `ServiceLaw`. Without observations the law speaks alone.
    """

    def __init__(self, law: ServiceLaw) -> None:
        self.law = law
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        self._mean = 1.0
        self._tail = law.tail_ratio
        self._since = 0

    def observe(self, units: float, seconds: float) -> None:
        """Take in one finished batch of `units` that took `seconds`."""
        self._ratios.append(seconds / max(self.law.mean_s(units), 1e-9))
        self._since += 1
        if self._since >= _REFRESH or len(self._ratios) <= _REFRESH:
            self._since = 0
            ordered = sorted(self._ratios)
            # The law stands in for the samples not yet seen, so that one odd first batch does not rule the estimate: enough of
            # them that a single one lies beyond the quantile. What lies there (a paused machine, a page fault) is in neither.
            missing = WINDOW // 2 - len(ordered)
            if missing > 0:
                ordered = sorted([*ordered, *[1.0] * missing])
            usual = ordered[: math.ceil(TAIL * len(ordered))]
            self._mean = sum(usual) / len(usual)
            self._tail = usual[-1]

    def mean_s(self, units: float) -> float:
        """Expected service time [s]."""
        return self.law.mean_s(units) * self._mean

    def tail_s(self, units: float) -> float:
        """95 % quantile of the service time [s]."""
        return self.law.mean_s(units) * self._tail


def fit_law(points: list[tuple[float, float]]) -> ServiceLaw:
    """The line through measured (units, seconds), by least squares on relative errors, neither coefficient negative.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("no points to fit a service law to")
    weights = [1 / max(seconds, 1e-9) ** 2 for _, seconds in points]
    total = sum(weights)
    mean_u = sum(w * u for w, (u, _) in zip(weights, points, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
    spread = sum(w * (u - mean_u) ** 2 for w, (u, _) in zip(weights, points, strict=True))
    covariance = sum(w * (u - mean_u) * (t - mean_t) for w, (u, t) in zip(weights, points, strict=True))
    # Rounding leaves points of one size a little spread, and no slope can be read from that.
    slope = max(covariance / spread, 0.0) if spread > 1e-12 * total * mean_u**2 else 0.0
    base = mean_t - slope * mean_u
    if base < 0:
        # Through the origin: the best slope without an intercept.
        squares = sum(w * u * u for w, (u, _) in zip(weights, points, strict=True))
        base, slope = 0.0, sum(w * u * t for w, (u, t) in zip(weights, points, strict=True)) / squares
    worst = max(seconds / max(base + slope * units, 1e-9) for units, seconds in points)
    return ServiceLaw(base_s=base, per_unit_s=slope, tail_ratio=max(worst, 1.0))
