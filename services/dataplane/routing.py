"""Which replica a hop goes to: power of two choices on expected completion, ejection after failures, a budget for retries.

One `RouteBook` per caller holds what it has learnt of each replica. Pure: time and randomness are arguments, so the gateway
and the simulator use the same book. Sources: Mitzenmacher 2001 (two choices); the retry budget follows Finagle's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_CANDIDATES = 3
FIRST_EJECTION_S = 1.0
LONGEST_EJECTION_S = 30.0
STALE_S = 1.0
"""Age of a replica's last report from which it says nothing any more."""
_MOST_DOUBLINGS = 16
"""More than the longest ejection needs; a replica that stays dead for hours must not double its way out of a float."""
_SMOOTHING = 0.2
"""Weight of the newest measurement in the moving averages."""


@dataclass(slots=True)
class ReplicaView:
    """What a caller knows of one replica. Times in seconds."""

    wait_s: float = 0.0
    """Expected wait it last reported,"""
    reported: float = -1e9
    """and when."""
    sent_since: int = 0
    """Tasks sent to it after that report was made, as far as this caller knows."""
    service_s: float = 0.0
    """Moving average of its compute time per task."""
    transfer_s: float = 0.0
    """Moving average of the time a call spends on the way: link, HTTP, and the two ends' event loops."""
    failures: int = 0
    """Failures in a row."""
    ejected_until: float = -1e9

    def expected_wait_s(self, now: float) -> float:
        """The wait of a task that arrives now: the reported one less the time since, plus what was sent meanwhile."""
        return max(self.wait_s - (now - self.reported), 0.0) + self.sent_since * self.service_s


class RouteBook:
    """Everything one caller has learnt about the replicas it sends to, by replica id."""

    def __init__(self) -> None:
        self._views: dict[str, ReplicaView] = {}

    def view(self, replica: str) -> ReplicaView:
        """The view of a replica, made on first sight."""
        view = self._views.get(replica)
        if view is None:
            view = self._views[replica] = ReplicaView()
        return view

    def forget_all_but(self, replicas: Iterable[str]) -> None:
        """Drop the replicas that no longer exist."""
        keep = set(replicas)
        self._views = {replica: view for replica, view in self._views.items() if replica in keep}

    def ejected(self, replica: str, now: float) -> bool:
        """Whether the replica failed so recently that it should be the last resort."""
        view = self._views.get(replica)
        return view is not None and now < view.ejected_until

    def completion_s(self, replica: str, link_s: float, now: float) -> float:
        """Expected time until a task sent now is back: link, wait and service.

        Of an idle replica that has not been heard of for a while only the link is known; taking the rest for nothing makes it
        be tried, or else the one that was once a little slower would never be asked again.
        """
        view = self.view(replica)
        if now - view.reported > STALE_S and not view.sent_since:
            return link_s
        return link_s + view.transfer_s + view.expected_wait_s(now) + view.service_s

    def order(self, replicas: Sequence[str], links_s: Sequence[float], now: float, rng: random.Random) -> tuple[int, ...]:
        """Candidates for a hop, best first, as indices into `replicas`: two drawn at random and compared, one in reserve.

        Ejected replicas are taken only when there are not enough others. Comparing two rather than all keeps callers with the
        same stale news from all running to the same replica.
        """
        if len(replicas) == 1:
            return (0,)
        healthy = [i for i, replica in enumerate(replicas) if not self.ejected(replica, now)]
        drawn = rng.sample(healthy, min(MAX_CANDIDATES, len(healthy)))
        pair = sorted(drawn[:2], key=lambda i: self.completion_s(replicas[i], links_s[i], now))
        chosen = [*pair, *drawn[2:]]
        if len(chosen) < min(MAX_CANDIDATES, len(replicas)):
            rest = [i for i in range(len(replicas)) if i not in healthy]
            rest.sort(key=lambda i: self.view(replicas[i]).ejected_until)
            chosen += rest[: MAX_CANDIDATES - len(chosen)]
        return tuple(chosen)

    def sent(self, replica: str) -> None:
        """A task has been sent to the replica."""
        self.view(replica).sent_since += 1

    def answered(
        self, replica: str, now: float, *, wait_s: float, service_s: float | None = None, transfer_s: float | None = None
    ) -> None:
        """The replica has answered, if only to refuse: take in its report and forgive its failures."""
        view = self.view(replica)
        view.wait_s = wait_s
        view.reported = now
        # Its report counts what it had queued by then, so only what is sent from here on comes on top.
        view.sent_since = 0
        view.service_s = _smooth(view.service_s, service_s)
        view.transfer_s = _smooth(view.transfer_s, transfer_s)
        view.failures = 0
        view.ejected_until = -1e9

    def failed(self, replica: str, now: float) -> None:
        """The replica could not be reached or broke off: eject it, for twice as long each time."""
        view = self.view(replica)
        if now < view.ejected_until:
            return  # one death fails every task in flight; it is one failure
        view.failures += 1
        view.ejected_until = now + min(FIRST_EJECTION_S * 2 ** min(view.failures - 1, _MOST_DOUBLINGS), LONGEST_EJECTION_S)


def _smooth(average: float, newest: float | None) -> float:
    if newest is None:
        return average
    return average + _SMOOTHING * (newest - average) if average > 0 else newest


class RetryBudget:
    """Retries as a share of requests, so that a failure cannot multiply the load it came from.

    Each request pays `ratio` of a token in, each retry takes one out; `reserve` tokens are there from the start and are also
    the most that can be saved up.
    """

    def __init__(self, ratio: float = 0.1, reserve: float = 100.0) -> None:
        self.ratio = ratio
        self.reserve = reserve
        self._tokens = reserve

    def request(self) -> None:
        """Count a first attempt."""
        self._tokens = min(self._tokens + self.ratio, self.reserve)

    def allow(self) -> bool:
        """Take a token for a retry; False when there is none."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
