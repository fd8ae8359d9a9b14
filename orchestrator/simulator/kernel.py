"""The discrete-event kernel: a heap of what happens when, and the virtual clock that it turns.

An event is an action and its argument, kept in the heap entry itself, so that an event costs one tuple. Events at the same
instant happen in order of priority, then in the order they were planned: nothing hangs on addresses or hashes, so a run is the
same in every process. Nothing here knows the wall clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Action = Callable[[Any], None]
"""Called with the argument that the event was planned with; typed by whoever plans it."""

URGENT, USUAL, LAST = 0, 1, 2
"""Priorities: of two events at one instant, the urgent one happens first."""
_INF = math.inf


class Kernel:
    """See the module. `now` [s] is the virtual clock, `events` how many events have happened."""

    __slots__ = ("_counter", "_heap", "events", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._counter = 0
        self._heap: list[tuple[float, int, int, Action, Any]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, time: float, action: Action, argument: Any = None, priority: int = USUAL) -> None:
        """Plan an event.

        Args:
            time: when [s]; an event in the past would turn the clock back.
            action: what happens.
            argument: what the action is called with.
            priority: among events at the same instant, the lower one first.

        Raises:
            ValueError: the time is past, infinite or no number.
        """
        if not self.now <= time < _INF:
            raise ValueError(f"an event cannot be planned for {time} s: it is {self.now} s now")
        self._counter += 1
        heappush(self._heap, (time, priority, self._counter, action, argument))

    def run(self, until: float) -> None:
        """Let everything happen that is planned up to `until` [s], that instant included, and leave the clock there."""
        heap, pop, events = self._heap, heappop, 0
        try:
            while heap and heap[0][0] <= until:
                self.now, _, _, action, argument = pop(heap)
                events += 1
                action(argument)
        finally:
            self.events += events
        self.now = max(self.now, until)

    def step(self) -> bool:
        """Let the next event happen; False where none is planned."""
        if not self._heap:
            return False
        self.run(self._heap[0][0])
        return True
