"""What goes wrong in a run, as frozen data. All times in seconds on the run's clock."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loss:
    """A node is lost: its replicas end at that instant, and nothing starts there before it is back."""

    node: str
    time: float
    back: float = math.inf
    """When it may be used again, empty."""

    def __post_init__(self) -> None:
        if not 0 <= self.time < self.back:
            raise ValueError(f"a node lost at {self.time} s cannot be back at {self.back} s")


@dataclass(frozen=True, slots=True)
class LinkFault:
    """A link is slower for a while, or gone, in both directions. The router is not told: it learns from answers."""

    a: str
    b: str
    from_s: float
    until_s: float = math.inf
    latency_factor: float = 1.0
    bandwidth_factor: float = 1.0
    cut: bool = False
    """Calls over the link break off, and nobody can be reached over it; callers learn it one latency later."""

    def __post_init__(self) -> None:
        if not 0 <= self.from_s < self.until_s:
            raise ValueError(f"a fault cannot last from {self.from_s} s until {self.until_s} s")
        if not (0 < self.latency_factor < math.inf and 0 < self.bandwidth_factor < math.inf):
            raise ValueError("the factors of a link fault must be above 0; to take a link away, cut it")


@dataclass(frozen=True, slots=True)
class Silence:
    """Nobody's metrics are sampled for a while; what was known before goes on ageing."""

    from_s: float
    until_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.from_s < self.until_s:
            raise ValueError(f"a silence cannot last from {self.from_s} s until {self.until_s} s")


Fault = Loss | LinkFault | Silence
