"""When to try again after a replica died: at once the first time, then later and later.

Pure; the runtime keeps one `Backoff` per service and node.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_S = 0.5
"""Pause after the second failure in a row [s]; it doubles with each further one."""
LONGEST_S = 30.0
SETTLED_S = 30.0
"""A replica that lived this long did not fail to start: the count begins anew [s]."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often it failed in a row, and until when nothing is started."""

    failures: int = 0
    until: float = 0.0
    """On the clock of the caller [s]."""
    total: int = 0
    """How often it failed in all; never starts anew."""

    def forgiven(self) -> Backoff:
        """State after something has changed: the next start may well succeed."""
        return Backoff(total=self.total)

    def after_failure(self, t: float, lived_s: float) -> Backoff:
        """State after a replica died at t, having been ready for `lived_s` seconds."""
        failures = 1 if lived_s >= SETTLED_S else self.failures + 1
        pause_s = 0.0 if failures == 1 else min(LONGEST_S, FIRST_S * 2.0 ** min(failures - 2, 16))
        return Backoff(failures, t + pause_s, self.total + 1)
