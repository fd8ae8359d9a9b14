"""Whether an engine, or a Swarm's manager, answers: known in one place, told to whoever waits for it, and watched for.

For the drivers that make replicas through somebody else, `engine` and `swarm`. One that does not answer is a `problem`:
everything is left as it is until it does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from orchestrator.runtimes.driver import Listener, Unreachable
from orchestrator.runtimes.engine_api import Refused

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
"""Between two tries to reach one that does not answer [s]."""

T = TypeVar("T")


class Reach:
    """What is known of one of them; `who` names it in messages."""

    def __init__(self, who: str, connect: Callable[[], Awaitable[object]]) -> None:
        self.who = who
        self.problem: str | None = None
        self.listener: Listener | None = None
        self.wake = asyncio.Event()
        """Set when there is something to look at; also when it is lost, which its stream of events will not say."""
        self.answers = asyncio.Event()
        """Set while it answers, as far as is known."""
        self.answers.set()
        self._connect = connect
        self._pause_s = FIRST_PAUSE_S

    async def asked(self, answer: Awaitable[T]) -> T:
        """The answer; where there is none, everybody is told."""
        try:
            return await answer
        except Unreachable as error:
            self._lost(str(error))
            raise

    async def watch(self, follow: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled: follow its events, and come back after a break.

        Args:
            follow: watches through one stream of events, and calls `found` when it has seen all there is. Raises Unreachable
                when the stream breaks. Whatever else it raises is told as a problem, and it is tried again.
        """
        while True:
            try:
                await self._connect()
                await follow()
            except Unreachable as error:
                self._lost(str(error))
            except Refused as refused:
                self._lost(f"{self.who} refuses to be watched: {refused}")
            except Exception as error:
                # An answer that nobody foresaw must not end the watch unnoticed.
                log.exception("%s could not be watched", self.who)
                self._lost(f"{self.who} has answered with something unforeseen: {error!r}")
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)

    def found(self) -> None:
        """It answers, and what is known is what there is."""
        self._pause_s = FIRST_PAUSE_S
        if self.problem is not None:
            self.problem = None
            self.answers.set()
            log.warning("%s answers again", self.who)
            self.changed()

    def changed(self) -> None:
        """Something that the listener asks about is otherwise now."""
        if self.listener is not None:
            self.listener.changed()

    def _lost(self, problem: str) -> None:
        self.wake.set()
        self.answers.clear()
        before, self.problem = self.problem, problem
        if before is None:
            log.warning("%s; until it answers again, every replica is left as it is", problem)
            self.changed()
