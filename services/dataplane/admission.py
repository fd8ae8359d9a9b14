"""Whether a task is let in: refused at the door when the predicted completion is past its deadline.

Refusing early is kinder than expiring late: the client learns at once, and when to come back. Pure, like all rules here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from services.dataplane.pipeline import Segment
from services.dataplane.routing import STALE_S, RouteBook


def replica_s(book: RouteBook, replicas: Sequence[str], now: float) -> float:
    """Expected time of one hop [s]: the least over the replicas of transfer, wait and service.

    0 where news is stale: an old report is no reason to refuse, and somebody has to find out.
    """
    best = math.inf
    for replica in replicas:
        if book.ejected(replica, now):
            continue  # nobody is sent there, so its silence says nothing of the others
        view = book.view(replica)
        if now - view.reported > STALE_S:
            return 0.0
        best = min(best, view.transfer_s + view.expected_wait_s(now) + view.service_s)
    return best if best < math.inf else 0.0


def at_most_s(book: RouteBook, replicas: Sequence[str], now: float) -> float:
    """What `replica_s` cannot exceed [s], by a look at one replica only.

    Where these sum up to less than the deadline over all steps, the task is let in, and nobody needs to look at the others.
    """
    replica = replicas[0]
    if book.ejected(replica, now):
        return math.inf
    view = book.view(replica)
    return view.transfer_s + view.expected_wait_s(now) + view.service_s


def critical_path_s(segments: Sequence[Segment], hop_s: Mapping[str, float]) -> float:
    """Expected time of a pipeline [s]: the longest way through its segments, with `hop_s` by service."""
    done: list[float] = []
    for segment in segments:
        start = max((done[parent] for parent in segment.parents), default=0.0)
        done.append(start + sum(hop_s[step.service] for step in segment.steps))
    return max(done)


def excess_s(predicted_s: float, budget_s: float) -> float:
    """By how much [s] the prediction misses the budget; 0 or less: let the task in. Positive: when to come back."""
    return predicted_s - budget_s
