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
DOUBTS = 16
"""Tasks dropped in a row after which the estimate is believed no more in full; an overload drops fewer between batches."""
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
        self._doubts = 0

    def observe(self, units: float, seconds: float) -> None:
        """Take in one finished batch of `units` that took `seconds`."""
        self._ratios.append(seconds / max(self.law.mean_s(units), 1e-9))
        self._since += 1
        self._doubts = 0
        if self._since >= _REFRESH or len(self._ratios) <= _REFRESH:
            self._since = 0
            self._refresh()

    def doubt(self) -> None:
        """A task was dropped because of this estimate. After many in a row with nothing computed between, forget the oldest.

        Otherwise a stage that was slow for a while would drop everything for ever: whoever computes nothing learns nothing.
        """
        self._doubts += 1
        if self._doubts >= DOUBTS and self._ratios:
            self._doubts = 0
            for _ in range(min(DOUBTS, len(self._ratios))):
                self._ratios.popleft()
            self._refresh()

    def _refresh(self) -> None:
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
