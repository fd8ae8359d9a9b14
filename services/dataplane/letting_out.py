"""When a standby is let out between two decisions: at once, by whoever sees that a task would wait too long.

The controller decides once a slot, and a burst is over by then. A standby is loaded and warm, so that one can be put to work in
milliseconds: the caller that chooses a replica for a task sends the task to a standby instead, and tells the orchestrator, as
long as the controller's allowance for the service lasts. The controller sees it in its next observation, and keeps it or takes
it back.
"""

from __future__ import annotations

from services.dataplane.routing import RouteBook

SHARE = 0.25
"""Of a hop's slack that a wait may take before a standby is let out."""
PATIENT_SHARE = 2.0
"""The same where the load has not changed for a while: there a single wait is chance, and not the beginning of a burst. It may
take what another hop will not need."""


def is_due(wait_s: float, slack_s: float, hops: int, share: float = SHARE) -> bool:
    """Whether a task that would wait so long is reason enough to let a standby out.

    A task's slack is divided evenly among the hops that it still has to make, since each of them may have a queue.

    Args:
        wait_s: expected wait at the best replica at work [s].
        slack_s: time until the task's deadline, less what the rest of its way needs without any wait [s].
        hops: that it still has to make, this one included; at least 1.
        share: of a hop's slack that may be spent on waiting; never more than all the slack there is.
    """
    return wait_s > 0.0 and wait_s > min(1.0, share / hops) * max(0.0, slack_s)


def introduce(book: RouteBook, standby: str, beside: str) -> None:
    """Take a standby that was never heard of to be as fast as a replica at work of the same service.

    A replica whose service time is unknown seems never to have a queue, and so it would be sent the whole burst before it has
    answered once.
    """
    fresh, known = book.view(standby), book.view(beside)
    if fresh.service_s <= 0.0:
        fresh.service_s, fresh.transfer_s = known.service_s, known.transfer_s
