"""A rolling update: one plan replaces another service by service, and the old one comes back if the new one does not hold.

    old  ──►  both (`plan.between`)  ──►  new          every replica of it is ready
                     └──────────────────►  old again   a replica fails to start too often, or time runs out

Which replica is replaced when is `reconcile`'s business (one at a time, the new one ready before the old one drains); this only
says which plan is in force, and for how long it is waited.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator import plan as plans
from orchestrator.plan import Plan

FAILED_STARTS = 3
"""Failures in a row, of one service on one node, after which the new plan is given up."""
POLL_S = 0.1
RETURN_LIMIT_S = 120.0
"""Longest wait for the old replicas to be all there again [s]."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far what runs is from what is wanted."""

    unsettled: tuple[str, ...]
    """Services that are not as wanted yet."""
    failures: Mapping[tuple[str, str], int]
    """(service, node) -> failures in a row."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an update stands."""

    state: Literal["rolling", "returning", "done", "rolled_back"]
    sha256: str
    """Of the testbed file that it leads to."""
    reason: str = ""
    """Why it was given up."""

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self.state in ("done", "rolled_back")


class Rollout:
    """One update."""

    def __init__(
        self,
        old: Plan,
        new: Plan,
        *,
        settle: Callable[[Plan], Awaitable[Plan]],
        take: Callable[[Plan], None],
        look: Callable[[], Standing],
        revert: Callable[[], None],
    ) -> None:
        """Plan an update.

        Args:
            old: what is in force.
            new: what is to be.
            settle: places the new plan's core services.
            take: puts a plan into force.
            look: tells how far what runs is from it.
            revert: called before the old plan comes back into force.

        Raises:
            UsageError: the one plan cannot replace the other.
        """
        self._old, self._new = old, new
        self.both = plans.between(old, new)
        """The plan in force on the way."""
        self._settle, self._take, self._look, self._revert = settle, take, look, revert
        self.progress = Progress("rolling", new.loaded.sha256)

    async def run(self, limit_s: float) -> None:
        """Carry it out; `progress` says what came of it.

        Args:
            limit_s: longest time until everything new is ready [s].
        """
        self._new = await self._settle(self._new)
        self.both = plans.between(self._old, self._new)
        self._take(self.both)
        problem = await self._wait(limit_s)
        if problem is None:
            self._take(self._new)
            self._set("done")
            return
        self._revert()
        self._take(self._old)
        self._set("returning", problem)
        late = await self._wait(RETURN_LIMIT_S)
        self._set("rolled_back", problem if late is None else f"{problem}; the old state is not all back either: {late}")

    async def _wait(self, limit_s: float) -> str | None:
        """Wait until all is as the plan in force wants it; what stands in the way, where it cannot be or is not in time."""
        end = time.monotonic() + limit_s
        before = self._look().failures
        while True:
            standing = self._look()
            for (service, node), failures in standing.failures.items():
                if failures >= FAILED_STARTS and failures > before.get((service, node), 0):
                    return f"{service} on {node} failed {failures} times in a row"
            if not standing.unsettled:
                return None
            if time.monotonic() > end:
                return f"not ready after {limit_s:g} s: {', '.join(standing.unsettled)}"
            await asyncio.sleep(POLL_S)

    def _set(self, state: Literal["returning", "done", "rolled_back"], reason: str = "") -> None:
        self.progress = Progress(state, self.progress.sha256, reason)
