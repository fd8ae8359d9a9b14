"""How a task ends other than with an answer, and the one JSON shape that says so.

    bytes --decode--> request --admit--> queued --compute--> result --forward--> answer
          BadRequest          NoReplica         Expired                UpstreamFailed
          TooLarge            Overloaded                               (or what the next stage said)
          NotFound            QueueFull

    TaskError
    ├── BadRequest      400  the request is wrong; sending it again will not help
    ├── NotFound        404  no such model, version or path
    ├── TooLarge        413  over a stated limit
    ├── QueueFull       429  the stage's queue is full; Retry-After says when to come back
    ├── Overloaded      429  the predicted wait exceeds the task's deadline; Retry-After likewise
    ├── InternalFailure 500  a fault of ours; the log has the trace, the answer does not
    ├── UpstreamFailed  502  every candidate replica of a stage failed
    ├── NoReplica       503  no replica of a stage is ready
    └── Expired         504  the deadline passed, or would have before the work was done

Every raise becomes `body()` with the class's status in one place, `services.hotpath`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar


class TaskError(Exception):
    """A task that ends without its answer. Subclasses fix the HTTP status and the machine-readable reason."""

    status: ClassVar[int]
    reason: str

    def __init__(
        self,
        message: str,
        *,
        stage: str | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
        budget_s: float | None = None,
        elapsed_s: float | None = None,
        hops: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.stage = stage
        if reason is not None:
            self.reason = reason
        self.retry_after_s = retry_after_s
        self.budget_s = budget_s
        self.elapsed_s = elapsed_s
        self.hops = hops if hops is not None else []
        self.request_id: str | None = None

    def body(self) -> dict[str, Any]:
        """The JSON error object: error, reason, and whatever of stage, budget_ms, elapsed_ms and hops is known."""
        body: dict[str, Any] = {"error": str(self), "reason": self.reason}
        if self.stage is not None:
            body["stage"] = self.stage
        if self.budget_s is not None:
            body["budget_ms"] = round(self.budget_s * 1e3, 3)
        if self.elapsed_s is not None:
            body["elapsed_ms"] = round(self.elapsed_s * 1e3, 3)
        if self.hops:
            body["hops"] = self.hops
        return body

    def headers(self) -> list[tuple[bytes, bytes]]:
        """`Retry-After` in whole seconds, at least 1 (RFC 9110, 10.2.3), and the request's id, where they are known."""
        headers = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.request_id is not None:
            headers.append((b"x-request-id", self.request_id.encode("latin-1")))
        return headers


class BadRequest(TaskError):
    """The request is malformed or names tensors the stage does not take."""

    status = 400
    reason = "bad_request"


class NotFound(TaskError):
    """No such model, version or path."""

    status = 404
    reason = "not_found"


class TooLarge(TaskError):
    """A body, header, tensor or text over its limit."""

    status = 413
    reason = "too_large"


class QueueFull(TaskError):
    """The stage holds as many tasks as it may."""

    status = 429
    reason = "queue_full"


class Overloaded(TaskError):
    """Refused at the door: the predicted wait leaves no hope of meeting the deadline."""

    status = 429
    reason = "overloaded"


class InternalFailure(TaskError):
    """A fault of the server, told without its details."""

    status = 500
    reason = "internal"

    @classmethod
    def of(cls, error: Exception) -> InternalFailure:
        """What is told of an error that nobody foresaw; log it."""
        return cls(f"internal error ({type(error).__name__}); the server's log has the details")


class UpstreamFailed(TaskError):
    """The candidates of the next stage could not be reached or broke off."""

    status = 502
    reason = "upstream_error"

    @classmethod
    def nonsense(cls, service: str, what: object) -> UpstreamFailed:
        """Of a service whose answer is none."""
        return cls(f"service {service!r} answered nonsense: {what}", stage=service)


class NoReplica(TaskError):
    """No replica of a needed service is ready."""

    status = 503
    reason = "no_replica"


class Expired(TaskError):
    """The deadline passed (`expired_in_queue`, `expired`) or would have (`would_expire`)."""

    status = 504
    reason = "expired"


def shown(value: Any) -> str:
    """What a request had instead, for a message: short, and a list or object by its kind alone.

    Those may be huge, or nested deeper than `repr` can follow.
    """
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return repr(value[:40] if isinstance(value, str) else value)[:80]


_BY_STATUS: Mapping[int, type[TaskError]] = {
    cls.status: cls for cls in (BadRequest, NotFound, TooLarge, QueueFull, InternalFailure, UpstreamFailed, NoReplica, Expired)
}


def from_answer(status: int, body: Mapping[str, Any], *, stage: str, retry_after_s: float | None = None) -> TaskError:
    """Rebuild the error another stage answered with, so that it reaches the client as it was said."""
    kind = _BY_STATUS.get(status, UpstreamFailed)
    hops = body.get("hops")
    return kind(
        str(body.get("error", f"stage {stage!r} answered HTTP {status}")),
        stage=str(body.get("stage", stage)),
        reason=str(body.get("reason", kind.reason)),
        retry_after_s=retry_after_s,
        hops=hops if isinstance(hops, list) else None,
    )
