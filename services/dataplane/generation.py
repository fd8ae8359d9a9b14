"""Which task joins a running batch of token generation, and how long an answer will take. Pure, as `batching` is.

A generating stage makes one token of every sequence of its batch in a step, and a task joins between two steps. Joining costs
those in the batch a prefill's time, and may cost them their deadlines.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from models.manifest import ServiceLaw
from services.dataplane.batching import DeadlineQueue, Waiting
from services.dataplane.service_time import DOUBTS, ServiceEstimate

WINDOW = 64
"""Answers looked back on for how many tokens they take."""


class Asks(Protocol):
    """A queued task, as far as the rule looks at it. `Waiting.items` are its sequences, `Waiting.lengths` the prompt's."""

    @property
    def tokens(self) -> int:
        """Most tokens that may have to be made before its instant: 1 for a stream."""


Q = TypeVar("Q", bound=Asks)


@dataclass(frozen=True, slots=True)
class Member:
    """A task in the running batch."""

    due: float
    """Instant [s] that must be met: of the whole answer, or of a stream's next token; inf where nothing must."""
    rows: int
    """Sequences."""
    steps: float
    """Steps expected until then, at least 1."""


class GenerationEstimate:
    """Expected time of an answer: prefill + (tokens - 1) x step  [s].

    The prefill's units are sequences x tokens of the longest prompt, a step's the sequences of the batch; both are laws from
    the warm-up, corrected by what follows (`ServiceEstimate`). Tokens are what an answer may have times the share that recent
    answers took of what they might have had. Before there is any it is taken for one token: whoever computes nothing learns
    nothing.
    """

    def __init__(self, prefill: ServiceLaw, step: ServiceLaw) -> None:
        self.prefill = ServiceEstimate(prefill)
        self.step = ServiceEstimate(step)
        self._shares: deque[float] = deque(maxlen=WINDOW)
        self._doubts = 0

    def answered(self, tokens: int, allowed: int) -> None:
        """Take in a finished sequence: it made `tokens` of at most `allowed`."""
        self._shares.append(tokens / allowed)
        self._doubts = 0

    def doubt(self) -> None:
        """A task was dropped because of this estimate; see `ServiceEstimate.doubt`. Of the lengths too the oldest go."""
        self.prefill.doubt()
        self._doubts += 1
        if self._doubts >= DOUBTS:
            self._doubts = 0
            for _ in range(min(DOUBTS, len(self._shares))):
                self._shares.popleft()

    def tokens(self, allowed: int) -> float:
        """Tokens to expect of an answer that may have `allowed`; at least 1."""
        share = sum(self._shares) / len(self._shares) if self._shares else 0.0
        return max(1.0, share * allowed)

    def mean_s(self, rows: int, length: int, allowed: int, batch: int) -> float:
        """Expected time [s] from joining to the last token, in a batch of `batch` sequences, these included."""
        return self.prefill.mean_s(rows * length) + (self.tokens(allowed) - 1.0) * self.step.mean_s(batch)

    def tail_s(self, rows: int, length: int, allowed: int, batch: int) -> float:
        """A time [s] that is probably (95 %) enough. Of many steps the long ones and the short ones even out."""
        return self.prefill.tail_s(rows * length) + (self.tokens(allowed) - 1.0) * self.step.mean_s(batch)


def next_to_join(
    queue: DeadlineQueue[Q],
    members: Sequence[Member],
    now: float,
    estimate: GenerationEstimate,
    max_rows: int,
) -> tuple[Waiting[Q] | None, list[Waiting[Q]]]:
    """Take the task that joins the batch next out of the queue, and with it those that are past saving.

    Earliest deadline first, and nobody overtakes: a task joins when its sequences have room and every member that would be in
    time without it is still in time with it. A member that is late however bounds nothing. A task that would probably not be
    in time if it joined now is doomed.

    Returns:
        (joining, doomed). Neither is in the queue any more; `joining` is None where nobody may join now.
    """
    running = sum(member.rows for member in members)
    doomed: list[Waiting[Q]] = []
    while True:
        urgent = queue.most_urgent(1)
        if not urgent:
            return None, doomed
        (first,) = urgent
        length = math.prod(first.lengths)
        together = running + first.items
        if now + estimate.tail_s(first.items, length, first.task.tokens, min(together, max_rows)) > first.due:
            queue.remove(first)
            doomed.append(first)
            if now < first.due:
                estimate.doubt()
            continue
        if together > max_rows or not _bearable(
            members, running, together, estimate.prefill.mean_s(first.items * length), now, estimate
        ):
            return None, doomed
        queue.remove(first)
        return first, doomed


def _bearable(
    members: Sequence[Member], running: int, together: int, prefill_s: float, now: float, estimate: GenerationEstimate
) -> bool:
    """Whether the running batch can wait for a prefill and then take slower steps."""
    before_s, after_s = estimate.step.mean_s(running), estimate.step.mean_s(together)
    for member in members:
        in_time = now + member.steps * before_s <= member.due
        if in_time and now + prefill_s + member.steps * after_s > member.due:
            return False
    return True
