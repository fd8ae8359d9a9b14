"""The end of a replica: an event that is set once, with how it ended; what every `driver.Handle` is built on."""

from __future__ import annotations

import asyncio


class Ending:
    """Told by whoever watches the replica, waited for by many."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()
        self.exit_code: int | None = None

    def ended(self, exit_code: int | None) -> None:
        """It has ended; said again, this changes nothing."""
        if not self.exited.is_set():
            self.exit_code = exit_code
            self.exited.set()

    async def wait(self, limit_s: float) -> bool:
        """Whether it ended within the limit."""
        try:
            async with asyncio.timeout(limit_s):
                await self.exited.wait()
        except TimeoutError:
            return False
        return True
