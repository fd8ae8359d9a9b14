"""Effective bandwidth against effective capacity: how unlikely a long wait is, and the fewest replicas that make it so.

Arrivals A and the service S that n busy replicas could give are processes of requests. With independent increments

    alpha(theta) =  log E exp(theta A(0, t)) / (theta t)     effective bandwidth: rises from the mean to the peak  [req/s]
    EC(theta)    = -log E exp(-theta S(0, t)) / (theta t)    effective capacity: falls from the mean to the least  [req/s]

the queue's exponent theta* is the root of alpha = EC [1/req], and with eta = theta* EC(theta*) [1/s]

    P(W > d) <= gamma exp(-eta d).

gamma = 1 is a bound for a single server with independent interarrival and service times (Kingman); gamma = Erlang C, the
probability to wait at all, is an approximation (exact for M/M/n), which a true tail may exceed: M/D/1 at rho = 0.8 has
P(W > 2) = 0.365 where it says 0.338.

Sources: Kelly, Notes on effective bandwidths, 1996; Chang, Performance Guarantees in Communication Networks, 2000;
Wu and Negi 2003 (effective capacity); Kingman 1964 (the bound).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.scaling import queueing

Prefactor = Literal["kingman", "erlang_c", "two_choices"]
"""What gamma is: 1 to guarantee, Erlang C to plan for replicas that share a queue. Replicas that have queues of their own, and
a router that compares two of them, do worse: "two_choices" is Erlang C, but no less than `queueing.two_choices_wait_tail`."""

Reason = Literal["no data", "unstable", "heavy tail", "few samples", "out of reach"]
"""Why there is no number: nothing was measured; the load exceeds the service; the moment generating function is not to be
trusted; too little was measured; no count within the limit keeps the promise."""

SPREADS = ((0.0, 2.0 / 3.0), (math.sqrt(3.0), 1.0 / 6.0), (-math.sqrt(3.0), 1.0 / 6.0))
"""Gauss-Hermite points in standard deviations, and their weights: exact for polynomials up to the fifth degree."""


@dataclass(frozen=True, slots=True)
class NoBound:
    """An assumption does not hold, so there is no number to give."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests that come to a service: Poisson groups, matched to two moments.

    A mean rate and an index of dispersion I (variance over mean of the count in a window) fix groups of I requests that come
    at rate lambda / I. I = 1 is Poisson, I > 1 comes in bursts, I -> 0 is a constant stream. The wait is that of a group's
    first request; the others wait for it too.
    """

    rate: float
    """lambda [req/s]."""
    dispersion: float = 1.0
    """I, over a window as long as the control acts (`estimators.dispersion`)."""
    rate_sd: float = 0.0
    """sigma [req/s]: standard deviation of the error of `rate` as a forecast."""

    def bandwidth(self, theta: float) -> float:
        """The effective bandwidth lambda (exp(theta I) - 1) / (theta I) [req/s]; the mean at 0."""
        return self.rate * _mean_exp(theta * self.dispersion)


@dataclass(frozen=True, slots=True)
class Service:
    """How long a replica computes: gamma distributed, matched to two moments."""

    mean_s: float
    """m = T(b) [s] of a batch of b = `batch` requests."""
    cv2: float = 1.0
    """Variance / mean^2 of T(b): 0 deterministic, 1 exponential."""
    batch: int = 1
    """b: requests that a busy replica serves at once. A batch starts with what is there, so nobody waits for it to fill."""

    @property
    def per_request_s(self) -> float:
        """T(b) / b: what a request takes of a busy replica [s]."""
        return self.mean_s / self.batch

    def capacity(self, theta: float) -> float:
        """The effective capacity of one replica [req/s], by renewal duality: s / theta at M_T(s) = exp(theta).

        With shape k = 1 / cv2 this is (1 - exp(-theta / k)) k / (m theta); 1 / m where nothing varies; 1 / m at 0.
        """
        return _mean_exp(-theta * self.cv2) / self.per_request_s


def _mean_exp(x: float) -> float:
    """(exp(x) - 1) / x, 1 at 0."""
    return math.expm1(x) / x if x else 1.0


# --- effective bandwidth and capacity of known processes ------------------------------------------------------------------


def gamma_capacity(shape: float, rate: float, slot_s: float, theta: float) -> float:
    """Effective capacity of a rate drawn anew from Gamma(k, beta) in each slot tau: k ln(1 + theta beta tau) / (theta tau).

    Args:
        shape: k.
        rate: beta [work/s], the scale of the gamma distribution.
        slot_s: tau [s].
        theta: [1/work]; at 0 it is the mean, k beta.
    """
    return shape * math.log1p(theta * rate * slot_s) / (theta * slot_s) if theta else shape * rate


def markov_capacity(transition: Sequence[Sequence[float]], rates: Sequence[float], slot_s: float, theta: float) -> float:
    """Effective capacity of a rate that follows a Markov chain, for theta > 0.

    It is -log(spectral radius of P diag(exp(-theta r tau))) / (theta tau).

    Args:
        transition: P, from row to column, once per slot; irreducible.
        rates: r [work/s] in each state.
        slot_s: tau [s].
        theta: [1/work].
    """
    return -_log_radius(transition, [-theta * rate * slot_s for rate in rates]) / (theta * slot_s)


def markov_bandwidth(transition: Sequence[Sequence[float]], rates: Sequence[float], slot_s: float, theta: float) -> float:
    """Effective bandwidth of arrivals whose rate follows a Markov chain: `markov_capacity` with theta's sign flipped."""
    return _log_radius(transition, [theta * rate * slot_s for rate in rates]) / (theta * slot_s)


def _log_radius(transition: Sequence[Sequence[float]], exponents: Sequence[float]) -> float:
    shift = max(exponents)
    tilted = np.asarray(transition, dtype=float) * np.exp(np.asarray(exponents) - shift)
    return shift + math.log(max(abs(np.linalg.eigvals(tilted))))


def exponent_of(bandwidth: Callable[[float], float], capacity: Callable[[float], float], most: float) -> float:
    """theta* = sup{theta <= most: alpha(theta) <= EC(theta)} [1/work]; 0 where the mean load is the mean service or more.

    For any two processes given as functions of theta; `decay` is the short way for `Arrivals` and `Service`.
    """
    if bandwidth(most) <= capacity(most):
        return most
    low, high = 0.0, most
    while (middle := (low + high) / 2.0) not in (low, high):
        low, high = (middle, high) if bandwidth(middle) <= capacity(middle) else (low, middle)
    return low if low > most * 1e-12 else 0.0


# --- the tail of the wait -------------------------------------------------------------------------------------------------


def decay(arrivals: Arrivals, service: Service, replicas: int) -> float:
    """Decay rate eta [1/s]: theta* alpha(theta*) at n EC(theta*) = alpha(theta*); 0 where the load is too much.

    With E = exp: the largest root of  lambda (E(theta I) - 1) / I = n k (1 - E(-theta / k)) / m,  whose two sides are eta.
    The difference is convex and 0 at 0, so that Newton's steps from the right fall onto the root and never beyond it.
    """
    rate, spread, cv2 = arrivals.rate, arrivals.dispersion, service.cv2
    full = replicas / service.per_request_s
    if rate >= full:
        return 0.0
    if rate <= 0.0 or spread + cv2 <= 0.0:
        return math.inf
    # Where growth of both sides is told by two moments, this would be the root; from there to its right.
    curvature = rate * spread + full * cv2
    if curvature < 1e-300:
        return math.inf  # a rate so near to 0 that its product with what varies is 0
    theta = 2.0 * (full - rate) / curvature
    most = 600.0 / max(spread, 1e-300)
    while theta < most and rate * _mean_exp(theta * spread) <= full * _mean_exp(-theta * cv2):
        theta *= 2.0
    theta = min(theta, most)
    if theta == most and rate * _mean_exp(most * spread) <= full * _mean_exp(-most * cv2):
        # Beyond what an exponential can hold; what the service says there is less than the root, to the safe side.
        return most * full * _mean_exp(-most * cv2)
    for _ in range(100):
        excess = theta * (rate * _mean_exp(theta * spread) - full * _mean_exp(-theta * cv2))
        if excess <= 0.0:
            break
        slope = rate * math.exp(theta * spread) - full * math.exp(-theta * cv2)
        if slope <= 0.0:
            break  # lost to rounding
        step = excess / slope
        theta -= step
        if step <= 1e-9 * theta:
            break
    return theta * rate * _mean_exp(theta * spread)


def waits(arrivals: Arrivals, service: Service, replicas: int, prefactor: Prefactor) -> float:
    """The prefactor gamma: the probability to wait at all, as `Prefactor` says.

    Groups of I > 1 requests see the system as n / I servers under r / I erlang (Hayward; Fredericks 1980), with n / I rounded
    down, to the safe side. Steadier arrivals are taken as Poisson.
    """
    if prefactor == "kingman":
        return 1.0 if arrivals.rate > 0.0 else 0.0
    group = max(1.0, arrivals.dispersion)
    return queueing.erlang_c(math.floor(replicas / group), arrivals.rate * service.per_request_s / group)


def late_probability(
    arrivals: Arrivals,
    service: Service,
    replicas: int,
    budget_s: float,
    *,
    backlog: float = 0.0,
    prefactor: Prefactor = "erlang_c",
) -> float:
    """The value v(n): what the tail of the wait says of P(W > d) for a forecast rate that may be wrong.

    v is gamma exp(-eta (d - q m / n)+), 1 where lambda m >= n, averaged over lambda + z sigma at `SPREADS`. It never
    rises with n and never falls with lambda or q.

    Args:
        arrivals: the forecast.
        service: what a replica does.
        replicas: n at work.
        budget_s: d, the wait that a task can bear [s].
        backlog: q, requests that wait already; they are served first.
        prefactor: with "kingman", a backlog that cannot be gone within d makes every task late.
    """
    if arrivals.rate_sd <= 0.0:
        return _late_at(arrivals, service, replicas, budget_s, backlog, prefactor)
    total = 0.0
    for spread, weight in SPREADS:
        rate = max(0.0, arrivals.rate + spread * arrivals.rate_sd)
        total += weight * _late_at(Arrivals(rate, arrivals.dispersion), service, replicas, budget_s, backlog, prefactor)
    return total


def _late_at(
    arrivals: Arrivals, service: Service, replicas: int, budget_s: float, backlog: float, prefactor: Prefactor
) -> float:
    if replicas <= 0:
        return 1.0 if arrivals.rate > 0.0 or backlog > 0.0 else 0.0
    if arrivals.rate * service.per_request_s >= replicas:
        return 1.0
    left_s = max(0.0, budget_s - backlog * service.per_request_s / replicas)
    eta = decay(arrivals, service, replicas)
    # With eta infinite nobody waits for others that come; what is left to wait for is the backlog.
    fade = (0.0 if left_s > 0.0 else 1.0) if math.isinf(eta) else math.exp(-eta * left_s)
    pooled = waits(arrivals, service, replicas, prefactor) * fade
    if prefactor != "two_choices" or replicas < 3 or arrivals.rate <= 0.0:
        return pooled
    offered = arrivals.rate * service.per_request_s
    return max(pooled, queueing.two_choices_wait_tail(offered, replicas, service.mean_s, service.cv2, left_s))


def wait_tail(
    arrivals: Arrivals | None,
    service: Service | NoBound | None,
    replicas: int,
    budget_s: float,
    prefactor: Prefactor = "kingman",
) -> float | NoBound:
    """As `late_probability`, or the assumption that does not hold.

    Args:
        arrivals: None where nothing was measured.
        service: None where nothing was measured; what `estimators.service_law` gave.
        replicas: n at work.
        budget_s: d [s].
        prefactor: "kingman" to certify.
    """
    if arrivals is None or service is None:
        return NoBound("no data", "no arrivals were measured" if arrivals is None else "no service times were measured")
    if isinstance(service, NoBound):
        return service
    offered = arrivals.rate * service.per_request_s
    if offered >= replicas:
        return NoBound("unstable", f"{offered:.3g} erlang are offered to {replicas} replicas")
    return late_probability(arrivals, service, replicas, budget_s, prefactor=prefactor)


# --- staffing -------------------------------------------------------------------------------------------------------------


def least_replicas(
    arrivals: Arrivals,
    service: Service,
    budget_s: float,
    epsilon: float,
    *,
    most: int,
    backlog: float = 0.0,
    prefactor: Prefactor = "erlang_c",
) -> int | NoBound:
    """The staffing rule: min{n: v(n) <= epsilon}, found by bisection since v never rises with n.

    Args:
        arrivals: the forecast over the time it takes to act; see `over_delay`.
        service: what a replica does.
        budget_s: d [s].
        epsilon: the promise: at most this share of tasks waits longer than d.
        most: no more than so many are looked at.
        backlog: q; see `backlog_after`.
        prefactor: gamma.
    """

    def keeps(replicas: int) -> bool:
        return late_probability(arrivals, service, replicas, budget_s, backlog=backlog, prefactor=prefactor) <= epsilon

    if keeps(0):
        return 0
    # From the offered load upward: the answer is near, and Erlang's recursion is long where n is large.
    low, stride = min(math.floor(arrivals.rate * service.per_request_s), most), 1
    while not keeps(min(low + stride, most)):
        if low + stride >= most:
            offered = arrivals.rate * service.per_request_s
            reason: Reason = "unstable" if offered >= most else "out of reach"
            return NoBound(reason, f"{offered:.3g} erlang; not even {most} replicas keep {epsilon:g} at {budget_s:g} s")
        low, stride = low + stride, stride * 2
    high = min(low + stride, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def over_delay(sd: float, slot_s: float, start_s: float) -> float:
    """Error sigma [req/s] of a forecast as far ahead as a decision made now acts: a start delay L and the slot that follows.

    Grows with the root of the horizon, as for a rate that wanders: sigma_h = sigma sqrt((L + T) / T).

    Args:
        sd: of the errors one slot ahead [req/s].
        slot_s: T [s].
        start_s: L, until a replica that is started now is ready [s]; about 0 with standbys.
    """
    return sd * math.sqrt((start_s + slot_s) / slot_s)


def backlog_after(backlog: float, arrivals: Arrivals, service: Service, replicas: int, start_s: float) -> float:
    """Backlog q that is left when replicas started now are ready: (q + (lambda - n / m) L)+ [requests].

    Args:
        backlog: q now.
        arrivals: what comes meanwhile.
        service: what a replica does.
        replicas: n at work until then.
        start_s: L [s].
    """
    return max(0.0, backlog + (arrivals.rate - replicas / service.per_request_s) * start_s)
