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

    busy_until: float = -1e9
    """When it will have done all that this caller knows of: the wait it last reported, and what was sent to it since."""
    reported: float = -1e9
    """When it last reported."""
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
        """The wait of a task that arrives now.

        A stage reports when the last of the stages behind it has answered. It is long done with the task by then, so that what
        was sent counts as work that gets less by the second; unless the replica has said nothing for so long that it may do
        nothing at all.
        """
        left_s = self.busy_until - now
        if self.sent_since and now - self.reported > STALE_S:
            left_s = max(left_s, self.sent_since * self.service_s)
        return left_s if left_s > 0.0 else 0.0


class RouteBook:
    """Everything one caller has learnt about the replicas it sends to, by replica id."""

    __slots__ = ("_ejected_until", "_views")

    def __init__(self) -> None:
        self._views: dict[str, ReplicaView] = {}
        self._ejected_until = -1e9
        """After this no replica is ejected, and nobody needs to look."""

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
        if now >= self._ejected_until:
            return False
        view = self._views.get(replica)
        return view is not None and now < view.ejected_until

    def completion_s(self, replica: str, link_s: float, now: float) -> float:
        """Expected time until a task sent now is back: link, wait and service.

        Of an idle replica that has not been heard of for a while only the link is known; taking the rest for nothing makes it
        be tried, or else the one that was once a little slower would never be asked again.
        """
        view = self._views.get(replica)
        if view is None:
            return link_s
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
        if now >= self._ejected_until:
            return self._better_first(_drawn(len(replicas), rng), replicas, links_s, now)
        healthy = [i for i, replica in enumerate(replicas) if not self.ejected(replica, now)]
        drawn = tuple([healthy[i] for i in _drawn(len(healthy), rng)])
        rest = [i for i in range(len(replicas)) if i not in healthy]
        rest.sort(key=lambda i: self.view(replicas[i]).ejected_until)
        return (*self._better_first(drawn, replicas, links_s, now), *rest)[:MAX_CANDIDATES]

    def best_first(
        self, order: tuple[int, ...], replicas: Sequence[str], links_s: Sequence[float], now: float
    ) -> tuple[int, ...]:
        """The same candidates behind the best of all living replicas: for a hop whose two draws are both busy.

        Dear, and callers with the same stale news choose alike, so that it is no way to choose for every hop.
        """
        living = [i for i, replica in enumerate(replicas) if not self.ejected(replica, now)]
        if not living:
            return order
        best = min(living, key=lambda i: self.completion_s(replicas[i], links_s[i], now))
        return (best, *(i for i in order if i != best))[:MAX_CANDIDATES]

    def _better_first(
        self, drawn: tuple[int, ...], replicas: Sequence[str], links_s: Sequence[float], now: float
    ) -> tuple[int, ...]:
        """The first two in order of expected completion."""
        if len(drawn) < 2:
            return drawn
        a, b = drawn[0], drawn[1]
        if self.completion_s(replicas[b], links_s[b], now) < self.completion_s(replicas[a], links_s[a], now):
            return (b, a, *drawn[2:])
        return drawn

    def sent(self, replica: str, now: float) -> None:
        """A task has been sent to the replica."""
        view = self.view(replica)
        view.sent_since += 1
        view.busy_until = (view.busy_until if view.busy_until > now else now) + view.service_s

    def answered(
        self, replica: str, now: float, *, wait_s: float, service_s: float | None = None, transfer_s: float | None = None
    ) -> None:
        """The replica has answered, if only to refuse: take in its report and forgive its failures."""
        view = self._views.get(replica) or self.view(replica)
        view.busy_until = now + wait_s
        view.reported = now
        # Its report counts what it had queued by then, so only what is sent from here on comes on top.
        view.sent_since = 0
        if service_s is not None:
            known_s = view.service_s
            view.service_s = known_s + _SMOOTHING * (service_s - known_s) if known_s > 0 else service_s
        if transfer_s is not None:
            known_s = view.transfer_s
            view.transfer_s = known_s + _SMOOTHING * (transfer_s - known_s) if known_s > 0 else transfer_s
        view.failures = 0
        view.ejected_until = -1e9

    def failed(self, replica: str, now: float) -> None:
        """The replica could not be reached or broke off: eject it, for twice as long each time."""
        view = self.view(replica)
        if now < view.ejected_until:
            return  # one death fails every task in flight; it is one failure
        view.failures += 1
        view.ejected_until = now + min(FIRST_EJECTION_S * 2 ** min(view.failures - 1, _MOST_DOUBLINGS), LONGEST_EJECTION_S)
        self._ejected_until = max(self._ejected_until, view.ejected_until)


def _drawn(count: int, rng: random.Random) -> tuple[int, ...]:
    """At most three distinct indices below `count`, every choice and order equally likely.

    The same as `rng.sample` at a fifth of its price: an index drawn among those left is moved past those taken before it.
    """
    if count < 2:
        return (0,)[:count]
    random_ = rng.random
    a, b = int(random_() * count), int(random_() * (count - 1))
    if b >= a:
        b += 1
        low, high = a, b
    else:
        low, high = b, a
    if count == 2:
        return (a, b)
    c = int(random_() * (count - 2))
    if c >= low:
        c += 1
    if c >= high:
        c += 1
    return (a, b, c)


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
        tokens = self._tokens + self.ratio
        self._tokens = tokens if tokens < self.reserve else self.reserve

    def allow(self) -> bool:
        """Take a token for a retry; False when there is none."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
