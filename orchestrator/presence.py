"""Which nodes are there to be planned with, as a pure function of what was seen of them: no flapping, whatever the nodes do.

            down                    grace over
      up ─────────► missing ──────────────────────► away
       ▲               │ up again                    │ up again
       ├───────────────┘                             ▼
       └──────────────────────────────────────── returning ──► away (down again)
                 stayed up for long enough

Nothing is placed on a node in any other state than `up`. Light services leave a missing node at once, since a start is all
that costs; core services are placed anew when it is away, and again when it is up. A node that was away is taken back only
after it has stayed up for a while, twice as long for each time that it went away again soon after.

A node may be there and yet be no place for some service: its disk is too full for the image, or its driver too old. A service
is planned elsewhere for a while once it has failed to start there several times in a row (`avoided`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["up", "missing", "away", "returning"]
Place = tuple[str, str]
"""(service, node)."""

MOST_DOUBLINGS = 5
"""A node that goes away again and again is waited for 32 times as long as the first time, at most."""
AVOID_AFTER, AVOID_S = 4, 300.0
"""Starts in a row that failed, after which a service is planned elsewhere; and for how long [s]."""
FORGIVEN = 10
"""A node that has been up for so many times the wait it was last taken back after is as good as new."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How long is waited."""

    grace_s: float
    """Until a node that is missing is planned without."""
    settle_s: float
    """That a node must stay up, after the first time it was away, until it is planned with again."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One node."""

    state: State
    since: float
    """[s]"""
    losses: int = 0
    """How often it went away, as far as that is not forgiven."""

    def wait_s(self, rules: Rules) -> float:
        """How long it must stay up to be taken back [s]."""
        return rules.settle_s * 2.0 ** min(max(self.losses - 1, 0), MOST_DOUBLINGS)


@dataclass(frozen=True, slots=True)
class Presence:
    """All nodes that are not simply up; begins with none."""

    nodes: Mapping[str, Standing] = field(default_factory=dict)

    @property
    def absent(self) -> frozenset[str]:
        """Nodes that nothing may be placed on."""
        return frozenset(name for name, standing in self.nodes.items() if standing.state != "up")

    @property
    def away(self) -> frozenset[str]:
        """Of these, the ones that core services are placed without."""
        return frozenset(name for name, standing in self.nodes.items() if standing.state in ("away", "returning"))

    def state(self, node: str) -> State:
        """Of one node."""
        return self.nodes[node].state if node in self.nodes else "up"


def step(presence: Presence, t: float, down: Collection[str], rules: Rules) -> Presence:
    """What is known at time t [s], when these nodes are down; called at every change, and now and then."""
    known = {name: _next(standing, t, name in down, rules) for name, standing in presence.nodes.items()}
    new = {name: Standing("missing", t) for name in down if name not in known}
    return Presence(
        {name: standing for name, standing in {**known, **new}.items() if standing.state != "up" or standing.losses}
    )


def avoided(known: Mapping[Place, float], t: float, failures: Mapping[Place, int]) -> dict[Place, float]:
    """Places that are not planned with, each with when that ends [s].

    Args:
        known: what was found before.
        t: now [s].
        failures: starts in a row that failed.
    """
    failing = {place: t + AVOID_S for place, number in failures.items() if number >= AVOID_AFTER}
    return {**{place: until for place, until in known.items() if until > t}, **failing}


def _next(standing: Standing, t: float, down: bool, rules: Rules) -> Standing:
    passed_s, losses = t - standing.since, standing.losses
    found: tuple[State, int] = (standing.state, losses)
    match standing.state:
        case "up" if down:
            found = "missing", losses
        case "up" if passed_s >= FORGIVEN * standing.wait_s(rules):
            found = "up", 0
        case "missing" if not down:
            found = "up", losses
        case "missing" if passed_s >= rules.grace_s:
            found = "away", losses + 1
        case "away" if not down:
            found = "returning", losses
        case "returning" if down:
            # It did not hold what it promised: the next time it is waited for longer.
            found = "away", losses + 1
        case "returning" if passed_s >= standing.wait_s(rules):
            found = "up", losses
    return standing if found == (standing.state, losses) else Standing(found[0], t, found[1])
