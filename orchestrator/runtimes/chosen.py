"""Which image containers and tasks are made from: a name's pinned id (`pins`), checked against what an engine has.

For the drivers that make something of images, `engine` and `swarm`. Their options say the names, their engine what a name
stands for now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable
from typing import Protocol, TypeVar

from orchestrator.errors import SetupFailed
from orchestrator.runtimes.containers import EngineOptions
from orchestrator.runtimes.driver import Launch, Unreachable
from orchestrator.runtimes.engine_api import Refused
from orchestrator.runtimes.pins import Pins

T = TypeVar("T")


class Images(Protocol):
    """Whoever knows what images there are."""

    async def image(self, name: str) -> str | None:
        """The id of an image; None where there is none of that name."""

    async def has_image(self, image: str) -> bool:
        """Whether there is an image of this id."""


class Chosen:
    """The images in use, with the verbs of an update; see `driver.Driver`."""

    def __init__(self, options: EngineOptions, pins: Pins, images: Images) -> None:
        self._options, self._pins, self._images = options, pins, images
        self.has_news = False
        """Whether a name stood for another image than the pinned one, when it was looked at."""

    def image(self, launch: Launch) -> str | None:
        """The id to make replicas of a service from; None where its image was not found."""
        return self._pins.image(self._options.image_for(launch))

    async def check(self) -> None:
        """Before first use: find the image for every name.

        Raises:
            SetupFailed: the engine has none for the stages.
        """
        await self._pin(self._options.image)
        with contextlib.suppress(Refused, SetupFailed):  # only services that ask for GPUs need it; their starts will tell
            await self._pin(self._options.gpu_image)

    async def _pin(self, name: str) -> None:
        """Find the image to use for a name: the pinned one where the engine still has it, else what the name stands for."""
        pinned = self._pins.image(name)
        there = pinned is not None and await unless_hidden(self._images.has_image(pinned))
        current = await self._images.image(name)
        if current is None and not there:
            raise SetupFailed(missing(name))
        if current is not None and not there:
            self._pins.set(name, current)
        elif current is not None:
            self.has_news = self.has_news or self._pins.is_news(name, current)

    async def refresh(self) -> None:
        """Use what the names stand for now."""
        for name in (self._options.image, self._options.gpu_image):
            with contextlib.suppress(Refused, Unreachable):
                if (image := await self._images.image(name)) is not None:
                    self._pins.try_out(name, image)

    def revert(self) -> None:
        """Back to the images before the last `refresh`."""
        self._pins.give_up()

    def keep(self) -> None:
        """What the last `refresh` found is good."""
        self._pins.keep()


async def unless_hidden(there: Awaitable[bool]) -> bool:
    """What the engine says; yes where the proxy before it hides such things, and then the first start will tell."""
    try:
        return await there
    except Refused as refused:
        if refused.status == 403:
            return True
        raise


def missing(name: str) -> str:
    """What to say of an image that is not there."""
    return f"image {name} is not on this engine: build it first (docker compose build)"
