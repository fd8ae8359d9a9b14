"""The texts of a streamed answer: what of them may be sent, and where a stop string ends them. Pure.

What comes is each text as far as it goes; what is sent is the difference. The last character may still be in the making, and
shows as U+FFFD until all its bytes are there; and the end may be the beginning of a stop string. Both are held back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.dataplane.wire import Tensor
from services.gateway.recognition import FINISH, TEXT, TOKENS_MADE

STOP = "stop"
_UNFINISHED = "\ufffd"


class Choice:
    """One text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.finish: str | None = None
        """Why it ended; None while it goes on."""
        self.cut = False
        """Whether a stop string ended it."""
        self._stops = tuple(stops)
        self._sent = 0
        self._ready = ""

    def take(self, whole: str, finish: str) -> None:
        """The text so far, and why it has ended ("" while it goes on)."""
        if self.finish is not None:
            return
        certain = whole if finish else whole.rstrip(_UNFINISHED)
        places = [place for stop in self._stops if (place := certain.find(stop)) >= 0]
        if places:
            self.cut = True
            self.finish = STOP
            certain = certain[: min(places)]
        elif finish:
            self.finish = finish
        else:
            certain = certain[: len(certain) - self._held_back(certain)]
        self._ready += certain[self._sent :]
        self._sent = max(self._sent, len(certain))

    def delta(self) -> str:
        """What has not been sent yet and may be."""
        ready, self._ready = self._ready, ""
        return ready

    def _held_back(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Choices:
    """The texts of an answer, one for each item."""

    def __init__(self, count: int, stops: Sequence[str]) -> None:
        self.each = [Choice(stops) for _ in range(count)]
        self.tokens = 0
        """Made so far, of all of them."""

    def take(self, outputs: Mapping[str, Tensor]) -> bool:
        """The outputs so far; True where stop strings have ended what would go on."""
        texts, reasons = outputs[TEXT].array, outputs.get(FINISH)
        for i, choice in enumerate(self.each):
            choice.take(texts[i].decode(errors="replace"), "" if reasons is None else reasons.array[i].decode())
        if (made := outputs.get(TOKENS_MADE)) is not None:
            self.tokens = int(made.array.sum())
        return any(choice.cut for choice in self.each) and all(choice.finish for choice in self.each)

    def end(self, outputs: Mapping[str, Tensor]) -> None:
        """The outputs are whole."""
        texts = outputs[TEXT].array
        for i, choice in enumerate(self.each):
            choice.take(texts[i].decode(errors="replace"), STOP)
