"""Which of several orchestrators leads: the one that holds a lease. The others wait, and one takes over when it runs out.

The lease is one small record in a store that can compare and swap. Who leads writes it anew every beat; who waits looks at it
and takes it when it has not changed for as long as a lease lasts, by its own clock, so that no two clocks are compared. Who
leads and has not been able to write for a little less than that leads no more, and ends: it stops before anybody else begins.

The store of the processes runtime is a file in the state directory, which all orchestrators of a testbed share anyway: their
replicas are processes of that machine. A flock makes the swap one step. It is held for that step only, so an orchestrator that
hangs loses the lease as one that died does.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from services.dataplane.document import Document, keep

log = logging.getLogger(__name__)

LASTS_S = 8.0
"""A lease that has not been renewed for so long has run out [s]."""
BEAT_S = 1.0
"""It is renewed, and looked at, this often [s]."""
MARGIN = 0.2
"""Who leads gives it up before others may take it, by this share of how long it lasts."""


class Claim(Document):
    """The record."""

    holder: str
    """Who leads; empty: nobody any more, and whoever waits may begin at once."""
    term: int = 0
    """Grows whenever somebody else takes it."""
    beat: int = 0
    """Grows whenever it is renewed."""
    over: bool = False
    """The testbed was taken down: nobody is to take over."""


class Store(Protocol):
    """Where the claim lies."""

    async def read(self) -> Claim | None:
        """The claim; None where there is none yet.

        Raises:
            OSError: the store cannot be reached.
        """

    async def write(self, claim: Claim, before: Claim | None) -> bool:
        """Put a claim in place of another; False where it was no longer that one, and nothing has changed.

        Raises:
            OSError: the store cannot be reached, and it is not known whether something has changed.
        """


@dataclass(slots=True)
class Watch:
    """What somebody who waits has seen. Pure: time is an argument."""

    lasts_s: float = LASTS_S
    _seen: Claim | None = None
    _since: float = field(default=-1.0)

    def may_take(self, claim: Claim | None, t: float) -> bool:
        """Whether the lease may be taken at time t [s], after it was read as this."""
        if claim is None or not claim.holder:
            return True
        if claim != self._seen or self._since < 0.0:
            self._seen, self._since = claim, t
        return t - self._since >= self.lasts_s


class Over(Exception):
    """The testbed has been taken down; nobody has to wait any more."""


class Lease:
    """One orchestrator's part in it: `take`, then `hold` until it is lost, then `release`."""

    def __init__(
        self,
        store: Store,
        holder: str,
        *,
        lasts_s: float = LASTS_S,
        beat_s: float = BEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._holder = store, holder
        self._lasts_s, self._beat_s, self._clock = lasts_s, beat_s, clock
        self._mine_s = (1.0 - MARGIN) * lasts_s
        self._claim: Claim | None = None
        self._written = 0.0

    async def take(self) -> None:
        """Wait until nobody leads, and lead.

        Raises:
            Over: the testbed was taken down meanwhile.
        """
        watch, first = Watch(self._lasts_s), True
        while True:
            try:
                seen, t = await self._store.read(), self._clock()
                if seen is not None and seen.over and not first:
                    raise Over
                first = False
                if watch.may_take(seen, t) or (seen is not None and seen.over):
                    claim = Claim(holder=self._holder, term=seen.term + 1 if seen is not None else 1)
                    if await self._store.write(claim, seen):
                        self._claim, self._written = claim, t
                        log.info("%s leads, in term %d", self._holder, claim.term)
                        return
            except OSError as error:
                log.warning("lease: %s", error)
            await asyncio.sleep(self._beat_s)

    async def hold(self) -> None:
        """Renew it, until it is lost: then somebody else leads, or soon will."""
        while self._claim is not None:
            await asyncio.sleep(self._beat_s)
            t = self._clock()
            if t - self._written > self._mine_s:
                log.error("the lease could not be renewed for %.1f s, so somebody else may lead", t - self._written)
                return
            fresh = self._claim.model_copy(update={"beat": self._claim.beat + 1})
            try:
                async with asyncio.timeout(self._mine_s - (t - self._written)):
                    if not await self._store.write(fresh, self._claim):
                        log.error("somebody else has taken the lease")
                        return
            except (OSError, TimeoutError) as error:
                log.warning("lease: not renewed: %s", error)
                # It may have been written after all.
                self._claim = await self._ours(fresh)
                continue
            self._claim, self._written = fresh, t

    async def _ours(self, fresh: Claim) -> Claim | None:
        """The claim as it stands now, if it is still one of ours."""
        try:
            seen = await self._store.read()
        except OSError:
            return self._claim
        return seen if seen in (fresh, self._claim) else None

    async def release(self, *, over: bool) -> None:
        """Let somebody else begin at once, or, where the testbed was taken down, nobody any more."""
        if self._claim is not None:
            claim = self._claim.model_copy(update={"holder": "", "over": over})
            try:
                await self._store.write(claim, self._claim)
            except OSError as error:
                log.warning("lease: not released: %s", error)


class FileStore:
    """A claim in a file, for orchestrators of one machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self) -> Claim | None:
        """See `Store`."""
        try:
            return Claim.model_validate_json(self._path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    async def write(self, claim: Claim, before: Claim | None) -> bool:
        """See `Store`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            # Nobody holds it for longer than this takes.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if await self.read() != before:
                return False
            keep(self._path, claim.model_dump_json())
            return True
