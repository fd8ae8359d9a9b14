"""Rules of the data plane that a simulation can do without, to see what each of them is worth."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What the simulated data plane does. The live one does all of it."""

    shedding: bool = True
    """Tasks that cannot be answered in time are refused on arrival, or dropped before any work is spent on them."""
    earliest_deadline_first: bool = True
    """The most urgent task is computed first; else the one that came first."""
    standby: bool = True
    """Replicas wait loaded and idle; else every replica that is started has to load first."""
    let_out: bool = True
    """Standbys are let out by events, between decisions (`services.dataplane.letting_out`)."""

    @property
    def name(self) -> str:
        """What is in use, for people: "all", "none", or names joined by +."""
        used = [name for name, on in asdict(self).items() if on]
        return "all" if len(used) == len(asdict(self)) else "+".join(used) or "none"


ALL = Ingredients()
NONE = Ingredients(shedding=False, earliest_deadline_first=False, standby=False, let_out=False)
