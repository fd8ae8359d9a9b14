"""Closed forms of classical queues: what waits behind Poisson arrivals, and how many servers keep the wait short.

Symbols, in every function here: lambda `arrival_rate` [req/s]; m `service_s`, the mean service time [s]; c `servers`;
r = lambda m `offered`, the offered load [erlang]; W the time in queue before service begins [s]. Each queue is first come,
first served, without limit, and in its steady state. A queue that is not stable (r >= c) has no steady state: means are
infinite and a wait longer than anything has probability 1.

Sources: Erlang 1917; Pollaczek 1930 and Khinchine 1932; Franx 2001 (M/D/c); Halfin and Whitt 1981; all but Franx in
Kleinrock, Queueing Systems I, 1975.
"""

from __future__ import annotations

import math


def mm1_mean_wait_s(arrival_rate: float, service_s: float) -> float:
    """Mean W of M/M/1: rho m / (1 - rho) [s] (Erlang)."""
    return mg1_mean_wait_s(arrival_rate, service_s, cv2=1.0)


def mm1_wait_tail(arrival_rate: float, service_s: float, wait_s: float) -> float:
    """P(W > t) of M/M/1: rho exp(-(mu - lambda) t), mu = 1/m (Erlang)."""
    return mmc_wait_tail(arrival_rate, service_s, 1, wait_s)


def md1_mean_wait_s(arrival_rate: float, service_s: float) -> float:
    """Mean W of M/D/1: half of M/M/1's [s] (Pollaczek, Khinchine)."""
    return mg1_mean_wait_s(arrival_rate, service_s, cv2=0.0)


def mg1_mean_wait_s(arrival_rate: float, service_s: float, cv2: float) -> float:
    """Mean W of M/G/1: rho m (1 + cv2) / (2 (1 - rho)) [s] (Pollaczek, Khinchine).

    Its tail has no closed form for a general service time; `effective_capacity` bounds it.

    Args:
        arrival_rate: lambda [req/s].
        service_s: m [s].
        cv2: squared coefficient of variation of the service time, variance / m^2.
    """
    rho = _offered(arrival_rate, service_s)
    return math.inf if rho >= 1.0 else rho * service_s * (1.0 + cv2) / (2.0 * (1.0 - rho))


def md1_wait_tail(arrival_rate: float, service_s: float, wait_s: float) -> float:
    """P(W > t) of M/D/1, exact (Franx's form for one server).

    Erlang's own sum alternates in sign and is lost to rounding after a few dozen service times; every term here is positive:
    P(W <= t) = sum_j P(at most k - 1 - j wait) x^j e^-x / j!, with (k - 1) m <= t < k m and x = lambda (k m - t).
    The work grows as (t/m)^2; below about 1e-15 the difference from 1 is rounding.
    """
    rho = _offered(arrival_rate, service_s)
    if rho >= 1.0:
        return 1.0
    if rho == 0.0:
        return 0.0
    k = math.floor(wait_s / service_s) + 1
    at_most = _md1_at_most_waiting(rho, k)
    x = arrival_rate * (k * service_s - wait_s)
    term, below = math.exp(-x), 0.0
    for j in range(k):
        below += at_most[k - 1 - j] * term
        term *= x / (j + 1)
    return max(0.0, 1.0 - below)


def _md1_at_most_waiting(rho: float, length: int) -> list[float]:
    """P(at most i wait), i = 0 .. length - 1: flows across each level of the chain seen at departures, in balance."""
    # Arrivals during one service are Poisson; `more[i]` = P(more than i of them).
    term, below = math.exp(-rho), 0.0
    more = []
    for i in range(length + 1):
        below += term
        more.append(max(0.0, 1.0 - below))
        term *= rho / (i + 1)
    in_system = [1.0 - rho]
    for level in range(1, length + 1):
        up = in_system[0] * more[level - 1] + sum(in_system[i] * more[level - i] for i in range(1, level))
        in_system.append(up * math.exp(rho))
    sums, total = [], in_system[0]
    for probability in in_system[1:]:
        total += probability
        sums.append(total)
    return sums


def erlang_b(servers: int, offered: float) -> float:
    """Erlang B: P(all c servers busy) where nobody waits (M/G/c/c).

    By the recursion B(n) = r B(n-1) / (n + r B(n-1)), B(0) = 1, which neither overflows nor cancels for any c.
    """
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return blocked


def erlang_c(servers: int, offered: float) -> float:
    """Erlang C: P(W > 0) of M/M/c, c B / (c - r (1 - B)); 1 where r >= c."""
    if offered >= servers:
        return 1.0
    blocked = erlang_b(servers, offered)
    return servers * blocked / (servers - offered * (1.0 - blocked))


def mmc_mean_wait_s(arrival_rate: float, service_s: float, servers: int) -> float:
    """Mean W of M/M/c: C(c, r) m / (c - r) [s] (Erlang)."""
    offered = _offered(arrival_rate, service_s)
    return math.inf if offered >= servers else erlang_c(servers, offered) * service_s / (servers - offered)


def mmc_wait_tail(arrival_rate: float, service_s: float, servers: int, wait_s: float) -> float:
    """P(W > t) of M/M/c: C(c, r) exp(-(c mu - lambda) t) (Erlang)."""
    offered = _offered(arrival_rate, service_s)
    if offered >= servers:
        return 1.0
    return erlang_c(servers, offered) * math.exp(-(servers - offered) * wait_s / service_s)


def two_choices_wait_tail(offered: float, servers: int, service_s: float, cv2: float, wait_s: float) -> float:
    """P(W > t) where each of c servers has a queue of its own, and a task joins the shorter of two drawn at random.

    Many servers of exponential service have a share s_k = rho^(2^k - 1) of queues with k tasks or more (Vvedenskaya, Dobrushin
    and Karpelevich 1996; Mitzenmacher 2001), so that a task finds k before it with probability s_k^2 - s_(k+1)^2 and waits for
    the rest of one service and k - 1 whole ones. That sum of k times is taken as Erlang's law of its mean, which is exact for
    cv2 = 1.

    An approximation: fewer servers do a little worse, and so does a router whose news of the queues is old.
    """
    rho = offered / servers
    if rho >= 1.0:
        return 1.0
    total, found = 0.0, rho * rho
    for k in range(1, 9):
        if found < 1e-12:
            break
        deeper = rho ** (2.0 * (2.0 ** (k + 1) - 1.0))
        phase_s = service_s * (k - 1 + (1.0 + cv2) / 2.0) / k
        term = below = math.exp(-wait_s / phase_s)
        for j in range(1, k):
            term *= wait_s / phase_s / j
            below += term
        total += (found - deeper) * below
        found = deeper
    return total


def mean_in_queue(arrival_rate: float, mean_wait_s: float) -> float:
    """Little's law: L = lambda W [requests]. It holds for every queue that empties again and again."""
    return arrival_rate * mean_wait_s


def halfin_whitt_delay(beta: float) -> float:
    """P(W > 0) of M/M/c in the limit c = r + beta sqrt(r), r -> infinity: 1 / (1 + beta Phi(beta) / phi(beta))."""
    density = math.exp(-beta * beta / 2.0) / math.sqrt(2.0 * math.pi)
    return density / (density + beta * 0.5 * math.erfc(-beta / math.sqrt(2.0)))


def halfin_whitt_beta(delay_probability: float) -> float:
    """The beta >= 0 at which `halfin_whitt_delay` is so much, by bisection.

    Raises:
        ValueError: not a probability in (0, 1].
    """
    if not 0.0 < delay_probability <= 1.0:
        raise ValueError(f"a probability of delay must be above 0 and at most 1, not {delay_probability:g}")
    low, high = 0.0, 40.0  # phi(40) is 0 in floating point: no probability needs more
    while (middle := (low + high) / 2.0) not in (low, high):
        low, high = (middle, high) if halfin_whitt_delay(middle) > delay_probability else (low, middle)
    return high


def square_root_staffing(offered: float, beta: float) -> int:
    """Servers c = ceil(r + beta sqrt(r)), never so few that the queue is not stable (Halfin, Whitt)."""
    least = math.floor(offered) + 1 if offered > 0.0 else 0
    return max(least, math.ceil(offered + beta * math.sqrt(offered)))


def _offered(arrival_rate: float, service_s: float) -> float:
    return arrival_rate * service_s
