"""Which image a name stands for, for as long as an update has not said otherwise.

Containers are made from image ids. A name that stands for another image by now (somebody built it again) changes nothing by
itself: an update follows it, and goes back to the id before if what it started does not come up. Both are written down, so
that a successor goes on with the same images, and does not try again what was given up.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import ValidationError

from services.dataplane.document import Document, keep

log = logging.getLogger(__name__)


class Pin(Document):
    """What is known of one name."""

    id: str
    """The image it stands for."""
    given_up: str = ""
    """An image it stood for later, from which nothing came up."""


class _File(Document):
    images: dict[str, Pin]


class Pins:
    """The file, and what is under way beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._pins = _File.model_validate_json(path.read_bytes()).images
        except (OSError, ValidationError):
            self._pins = {}
        self._tried: dict[str, str] = {}

    def image(self, name: str) -> str | None:
        """The id to make containers from; None for a name that was never pinned."""
        pin = self._pins.get(name)
        return self._tried.get(name, pin.id if pin is not None else None)

    def set(self, name: str, image: str) -> None:
        """Pin a name for good."""
        self._tried.pop(name, None)
        self._save({**self._pins, name: Pin(id=image)})

    def try_out(self, name: str, image: str) -> None:
        """Use another image until `keep` or `give_up`."""
        self._tried[name] = image

    def keep(self) -> None:
        """What was tried out is good."""
        for name, image in dict(self._tried).items():
            self.set(name, image)

    def give_up(self) -> None:
        """Back to the images before."""
        changed = {name: image for name, image in self._tried.items() if name in self._pins and self._pins[name].id != image}
        self._tried.clear()
        self._save(self._pins | {name: Pin(id=self._pins[name].id, given_up=image) for name, image in changed.items()})

    def is_news(self, name: str, image: str) -> bool:
        """Whether an image is neither the pinned one nor one that was given up."""
        pin = self._pins.get(name)
        return pin is not None and image not in (pin.id, pin.given_up)

    def _save(self, pins: dict[str, Pin]) -> None:
        self._pins = pins
        try:
            keep(self._path, _File(images=pins).model_dump_json())
        except OSError as error:
            log.warning("the images in use could not be written down, so a successor will take what their names say: %s", error)
