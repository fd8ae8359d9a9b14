"""How one task ended: its outcome, the rule that names it, and the record the statistics are made of.

A leaf, pure. The rule counts from the *scheduled* send, so a generator or a server that falls behind cannot hide it, and
whatever happened ends in exactly one outcome. The simulator's tasks become the same records.

    scheduled          sent            finished               all [s] since the measured part of the run began;
        |----- lag ------|----- service ---|                  warm-up tasks are scheduled before 0
        |------------- latency ------------|
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Outcome = Literal["on_time", "late", "expired", "rejected", "failed", "cancelled"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class Hop:
    """Where a task spent its time at one step, as the server told it; times in seconds."""

    step: str
    service: str
    replica: str
    node: str
    queue_s: float
    compute_s: float
    transfer_s: float
    batch: int
    """Items computed together with this task's, its own included."""

    @property
    def total_s(self) -> float:
        """Time at this hop [s]."""
        return self.queue_s + self.compute_s + self.transfer_s


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """All that is known of one task. Times in seconds since the measured part of the run began."""

    pipeline: str
    index: int
    """Position in the pipeline's schedule, from 0; negative in the warm-up."""
    scheduled_s: float
    sent_s: float | None
    """When the generator handed the task to the network; None if it never did."""
    finished_s: float | None
    """When the last byte of the answer was there; None without an answer."""
    deadline_s: float
    """Relative to the scheduled send."""
    status: int | None
    """HTTP status; None without an answer."""
    reason: str | None
    """Why there was no answer, one word for counting: the server's own where it gave one."""
    outcome: Outcome
    hops: tuple[Hop, ...] = ()
    retry_after_s: float | None = None
    detail: str | None = None
    """What the server or the network said about it, for people."""

    @property
    def latency_s(self) -> float | None:
        """From the scheduled send to the last byte of the answer [s]; None without an answer."""
        return None if self.finished_s is None else self.finished_s - self.scheduled_s

    @property
    def send_lag_s(self) -> float | None:
        """How late the generator sent the task [s]; None if it never did."""
        return None if self.sent_s is None else self.sent_s - self.scheduled_s

    def as_dict(self) -> dict[str, Any]:
        """The record as one JSON object: every field, and `latency_s` and `send_lag_s`."""
        return {**asdict(self), "latency_s": self.latency_s, "send_lag_s": self.send_lag_s}


def classify(
    status: int | None, latency_s: float | None, deadline_s: float, *, problem: str | None = None, given_up: bool = False
) -> Outcome:
    """The outcome of a task.

        given up by the generator on purpose (the run was interrupted)   cancelled
        no answer, or an answer with a problem                           failed
        200 within the deadline                                          on_time
        200 after it                                                     late
        504                                                              expired
        429, 503                                                         rejected
        any other status                                                 failed

    Args:
        status: HTTP status, None without an answer.
        latency_s: from the scheduled send to the end of the answer [s], None without an answer.
        deadline_s: relative to the scheduled send [s]; an answer at exactly the deadline is on time.
        problem: why the task has no usable answer: never sent, no connection, no answer in time, a 200 that is no answer.
        given_up: whether the generator itself gave the task up because the run ended.
    """
    if given_up:
        return "cancelled"
    if problem is not None or status is None or latency_s is None:
        return "failed"
    if status == 200:
        return "on_time" if latency_s <= deadline_s else "late"
    if status == 504:
        return "expired"
    return "rejected" if status in {429, 503} else "failed"


def hops_of(value: object) -> tuple[Hop, ...]:
    """The hops of an answer's `parameters.hops` or an error's `hops`.

    Other servers send none, or something else by that name, and a stage that dropped the task before computing has no times to
    tell: what is no hop with times is left out, and is no failure either.
    """
    hops = (_hop(entry) for entry in value) if isinstance(value, list) else ()
    return tuple(hop for hop in hops if hop is not None)


def _hop(entry: Any) -> Hop | None:
    try:
        return Hop(
            step=str(entry["step"]),
            service=str(entry["service"]),
            replica=str(entry.get("replica", "")),
            node=str(entry.get("node", "")),
            queue_s=_duration(entry["queue_s"]),
            compute_s=_duration(entry["compute_s"]),
            transfer_s=_duration(entry.get("transfer_s", 0.0)),
            batch=int(entry.get("batch", 1)),
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        return None


def _duration(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError("a duration must be finite")
    return seconds
