"""What measurements say of arrivals and service, with how far they can be trusted: pure functions of samples and counts.

The logarithm of a mean of exponentials is dominated by the few largest samples. Its plug-in estimate is too low, so that the
tail it promises is too good. Every estimate here is moved to the safe side by its bias and by z standard deviations, and is
refused where few samples carry the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.scaling.effective_capacity import NoBound, Service

LEAST_SAMPLES = 30
"""With fewer, no second moment is taken for known."""
LEAST_SHARE = 0.3
"""Of the samples, that must carry the weight of an exponential mean (effective sample size / samples)."""
TAIL_SHARE = 0.1
"""The largest samples, by which a tail is judged."""


@dataclass(frozen=True, slots=True)
class LogMgf:
    """The estimate of log E exp(theta X) from independent samples."""

    value: float
    bias: float
    """Its expected error, below 0 (delta method): -(M(2 theta) / M(theta)^2 - 1) / (2 n)."""
    sd: float
    """Its standard deviation: sqrt((M(2 theta) / M(theta)^2 - 1) / n)."""
    effective_samples: float
    """(sum w)^2 / sum w^2 of the weights w = exp(theta x)."""
    samples: int

    @property
    def certified(self) -> bool:
        """Whether enough samples carry the weight."""
        return self.effective_samples >= LEAST_SAMPLES and self.effective_samples >= LEAST_SHARE * self.samples


def log_mgf(samples: Sequence[float], theta: float) -> LogMgf:
    """Estimate log E exp(theta X), shifted by the largest exponent so that nothing overflows.

    Args:
        samples: of X, at least one, independent. For correlated slots, sums over blocks of twice their correlation time.
        theta: of either sign [1/unit of X].
    """
    exponents = theta * np.asarray(samples, dtype=float)
    shift = float(exponents.max())
    weights = np.exp(exponents - shift)
    n = len(weights)
    effective = float(weights.sum()) ** 2 / float((weights * weights).sum())
    relative_variance = max(0.0, n / effective - 1.0)
    value = shift + math.log(float(weights.mean()))
    return LogMgf(value, -relative_variance / (2 * n), math.sqrt(relative_variance / n), effective, n)


def bandwidth(work: Sequence[float], window_s: float, theta: float, z: float = 1.645) -> float | NoBound:
    """Effective bandwidth of arrivals [work/s], from the work that came in each window; errs upward.

    Args:
        work: in consecutive windows, taken as independent.
        window_s: length of a window [s].
        theta: above 0 [1/work].
        z: standard deviations to the safe side; 1.645 is wrong one time in twenty.
    """
    return _exponential_rate(work, window_s, theta, z)


def capacity(work: Sequence[float], window_s: float, theta: float, z: float = 1.645) -> float | NoBound:
    """Effective capacity of service [work/s], from the work done in each window; errs downward.

    Args:
        work: done in windows *in which the server was busy throughout*: an idle window measures the load, not the service.
        window_s: length of a window [s].
        theta: above 0 [1/work].
        z: standard deviations to the safe side.
    """
    return _exponential_rate(work, window_s, -theta, z)


def _exponential_rate(work: Sequence[float], window_s: float, theta: float, z: float) -> float | NoBound:
    """(log mgf - bias + z sd) / (theta window): above the truth for theta > 0, below it for theta < 0."""
    if not work:
        return NoBound("no data", "no window was measured")
    if len(work) < LEAST_SAMPLES:
        return NoBound("few samples", f"{len(work)} windows, {LEAST_SAMPLES} are needed")
    estimate = log_mgf(work, theta)
    if not estimate.certified:
        detail = f"{estimate.effective_samples:.0f} of {estimate.samples} windows carry the weight at theta {theta:g}"
        return NoBound("heavy tail" if theta > 0.0 else "few samples", detail)
    return (estimate.value - estimate.bias + z * estimate.sd) / (theta * window_s)


def dispersion(counts: Sequence[float]) -> float | NoBound:
    """Index of dispersion I of counts: variance over mean; 1 for Poisson.

    Args:
        counts: of arrivals in consecutive windows of equal length.
    """
    if not counts or not any(counts):
        return NoBound("no data", "nothing arrived")
    if len(counts) < LEAST_SAMPLES:
        return NoBound("few samples", f"{len(counts)} windows, {LEAST_SAMPLES} are needed")
    return float(np.var(counts, ddof=1) / np.mean(counts))


def service_law(samples_s: Sequence[float], batch: int = 1) -> Service | NoBound:
    """The law of service times, matched to mean and variance where the tail is no heavier than an exponential one.

    Args:
        samples_s: compute times of batches of this size [s], independent.
        batch: b.
    """
    if not samples_s:
        return NoBound("no data", "no service times were measured")
    if len(samples_s) < LEAST_SAMPLES:
        return NoBound("few samples", f"{len(samples_s)} service times, {LEAST_SAMPLES} are needed")
    verdict = heavy_tail(samples_s)
    if verdict is not None:
        return verdict
    mean = float(np.mean(samples_s))
    return Service(mean, float(np.var(samples_s, ddof=1)) / mean**2, batch)


def heavy_tail(samples: Sequence[float], z: float = 2.33) -> NoBound | None:
    """Whether what exceeds a high threshold varies more than an exponential would; None where it does not.

    The excesses of an exponential tail have a coefficient of variation of 1, of a lighter one less, of a power law more. From
    k of them it is 1 within 1 / sqrt(k) (del Castillo, Daoudi and Lockhart 2014). It is no proof: of samples of 500 from a
    Pareto law of index 1.8, three in four are called heavy.

    Args:
        samples: at least `LEAST_SAMPLES`.
        z: standard deviations above 1 from where the tail counts as heavy; 2.33 is wrong one time in a hundred.
    """
    ordered = np.sort(np.asarray(samples, dtype=float))
    k = max(10, math.floor(TAIL_SHARE * len(ordered)))
    excesses = ordered[-k:] - ordered[-k - 1]
    mean = float(excesses.mean())
    variation = float(excesses.std()) / mean if mean > 0.0 else 0.0
    if variation <= 1.0 + z / math.sqrt(k):
        return None
    return NoBound("heavy tail", f"the largest {k} of {len(ordered)} samples vary by {variation:.2f}; an exponential tail by 1")


# --- the arrival rate, from slot to slot ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RateState:
    """What is known of an arrival rate."""

    rate: float | None = None
    """lambda [req/s]; None before anything was measured."""
    error_variance: float = 0.0
    """Of `rate` as a forecast of the next slot, less what Poisson counts vary by themselves [(req/s)^2]."""
    slots: int = 0
    """Slots measured, while they are fewer than the memory is long."""

    @property
    def error_sd(self) -> float:
        """Standard deviation of the forecast's error [req/s]; 0 where counts vary no more than Poisson's."""
        return math.sqrt(max(0.0, self.error_variance))


def track(state: RateState, measured: float, elapsed_s: float, memory_s: float, jump: float = 2.5) -> RateState:
    """One more slot: an exponentially weighted mean that follows a jump at once.

    A count above lambda T + jump sqrt(lambda T) + 1 is no chance, so that the mean starts anew from it. Falls are followed
    slowly: too much is only dear, too little is late.

    Args:
        state: before the slot.
        measured: arrivals of the slot over its length [req/s].
        elapsed_s: T, length of the slot [s].
        memory_s: time constant of the mean [s]; the error's is ten times as long.
        jump: standard deviations.
    """
    if state.rate is None:
        return RateState(measured, 0.0, 1)
    error = measured - state.rate
    expected = state.rate * elapsed_s
    weight = 1.0 - math.exp(-elapsed_s / memory_s)
    jumped = measured * elapsed_s > expected + jump * math.sqrt(expected) + 1.0
    rate = measured if jumped else state.rate + weight * error
    slots = min(state.slots + 1, math.ceil(10.0 * memory_s / elapsed_s))
    # Counts vary by lambda / T even where the forecast is right; what they vary by more is the forecast's error.
    surplus = error * error - state.rate / elapsed_s
    variance = state.error_variance + (surplus - state.error_variance) * max(1.0 / slots, weight / 10.0)
    return replace(state, rate=rate, error_variance=variance, slots=slots)


# --- an arrival rate that stays and jumps -------------------------------------------------------------------------------------

ALARM = 8.0
"""Evidence, as a log likelihood ratio, at which a rate counts as changed: by chance about once in e^8 = 3000 slots."""
SHIFT = 1.5
"""The change that evidence is gathered for: a rate this many times higher, or lower. Larger changes are found sooner."""
SMOOTH_S = 60.0
"""Time constant of the index of dispersion [s]."""
MOST_SQUARED = 9.0
"""A squared standardised count counts at most so much in the dispersion, so that a change does not pass for noise."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """That the rate has changed one way, and what came since it seems to have (Page's cumulative sum)."""

    score: float = 0.0
    count: float = 0.0
    """Requests since the score was last 0."""
    span_s: float = 0.0
    """Time since then [s]."""

    def add(self, gain: float, count: float, elapsed_s: float) -> Evidence:
        """One more slot."""
        score = self.score + gain
        return Evidence(score, self.count + count, self.span_s + elapsed_s) if score > 0.0 else Evidence()


@dataclass(frozen=True, slots=True)
class Level:
    """What is known of an arrival rate that stays as it is until it changes."""

    rate: float | None = None
    """lambda [req/s]: the mean since the last change; None before anything was measured."""
    span_s: float = 0.0
    """Time that the mean is over [s]."""
    dispersion: float = 1.0
    """I of the counts of slots around that mean, at least 1."""
    error_variance: float = 0.0
    """Of `rate` as a forecast of the next slot, less what counts vary by themselves [(req/s)^2]."""
    rise: Evidence = Evidence()
    fall: Evidence = Evidence()

    @property
    def standard_error(self) -> float:
        """Of `rate` as the mean it stands for [req/s]."""
        return math.sqrt((self.rate or 0.0) * self.dispersion / self.span_s) if self.span_s > 0.0 else 0.0


def follow(level: Level, measured: float, elapsed_s: float, memory_s: float) -> Level:
    """One more slot: the mean of all since the last change, and whether this is a change.

    A mean over long windows is exact and slow, over short ones it is quick and restless. This one is over as much as there is
    since the rate changed: Page's test (1954) adds up how much likelier the counts are with `SHIFT` times the rate than with
    the rate itself, and once that is beyond doubt, the mean starts anew from the slots in which it was so.

    Args:
        level: before the slot.
        measured: arrivals of the slot over its length [req/s].
        elapsed_s: T, length of the slot [s].
        memory_s: the mean is over no more than so long [s], for changes too slow to be found.
    """
    if level.rate is None:
        return Level(measured, elapsed_s)
    count, expected = measured * elapsed_s, max(level.rate * elapsed_s, 1e-9)
    # A count that varies I times as much as Poisson's is worth a count I times smaller.
    weight = 1.0 / level.dispersion
    rise = level.rise.add(weight * (count * math.log(SHIFT) - (SHIFT - 1.0) * expected), count, elapsed_s)
    fall = level.fall.add(weight * (-count * math.log(SHIFT) + (1.0 - 1.0 / SHIFT) * expected), count, elapsed_s)
    error = measured - level.rate
    surplus = error * error - level.rate * level.dispersion / elapsed_s
    variance = level.error_variance + (surplus - level.error_variance) * min(1.0, elapsed_s / memory_s)
    for found in (rise, fall):
        if found.score > ALARM:
            # The change came somewhere within the first of these slots: the mean is not to be trusted for as long as it is.
            return Level(found.count / found.span_s, found.span_s / 2.0, level.dispersion, max(0.0, variance))
    span_s = min(level.span_s + elapsed_s, memory_s)
    rate = level.rate + error * elapsed_s / span_s
    squared = min(MOST_SQUARED, (count - expected) ** 2 / max(expected, 1.0))
    dispersion = max(1.0, level.dispersion + (squared - level.dispersion) * min(1.0, elapsed_s / SMOOTH_S))
    return Level(rate, span_s, dispersion, max(0.0, variance), rise, fall)


BINS_PER_DOUBLING = 4
"""Of the rates that are remembered: bins 19 % wide."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates that tasks met lately: in each bin, what share of the tasks came in slots with such a rate."""

    shares: tuple[tuple[int, float], ...] = ()
    """(bin, tasks), ascending; a bin k holds rates up to 2^(k / 4) req/s. What is old weighs less."""

    def add(self, rate: float, elapsed_s: float, memory_s: float) -> Rates:
        """One more slot; those `memory_s` ago weigh 1/e [s]."""
        keep = math.exp(-elapsed_s / memory_s)
        shares = {bin_: tasks * keep for bin_, tasks in self.shares if tasks > 1e-6}
        if rate > 0.0:
            bin_ = math.ceil(BINS_PER_DOUBLING * math.log2(rate) - 1e-9)
            shares[bin_] = shares.get(bin_, 0.0) + rate * elapsed_s
        return Rates(tuple(sorted(shares.items())))

    def quantile(self, epsilon: float, now: int | None = None) -> int | None:
        """The lowest bin above which no more than a share epsilon of the tasks came; None where there were none.

        Args:
            epsilon: share of tasks.
            now: what this said the last time: it is lowered only where half of epsilon allows it.
        """
        whole = math.fsum(tasks for _, tasks in self.shares)
        above, lower = 0.0, None
        for bin_, tasks in reversed(self.shares):
            above += tasks
            if lower is None and above > 0.5 * epsilon * whole:
                lower = bin_
            if above > epsilon * whole:
                return bin_ if now is None or lower is None or now <= bin_ else min(now, lower)
        return None


def rate_of(bin_: int) -> float:
    """The largest rate in a bin [req/s]."""
    return float(2.0 ** (bin_ / BINS_PER_DOUBLING))


# --- a service time, from slot to slot ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of a service time from the moments that a signal tells."""

    samples: float = 0.0
    """Requests that the moments are over, while they are fewer than are remembered."""
    mean_s: float = 0.0
    square: float = 0.0
    """Mean of the squares [s^2]."""
    spread_samples: float = 0.0
    """Of those, the requests whose variance was told."""
    batch: float = 1.0
    """Mean number of requests computed together."""

    @property
    def cv2(self) -> float | None:
        """Variance over mean squared; None where no variance was told."""
        if self.spread_samples < LEAST_SAMPLES or self.mean_s <= 0.0:
            return None
        return max(0.0, self.square / self.mean_s**2 - 1.0)


REMEMBERED = 2000.0
"""Requests that the moments of a service time are over at most."""


def serve(served: Served, count: float, mean_s: float, cv2: float | None, batch: float | None) -> Served:
    """One more slot, in which `count` requests were computed."""
    if count <= 0.0:
        return served
    samples = min(served.samples + count, REMEMBERED)
    weight = min(1.0, count / samples)
    spread = min(served.spread_samples + count, REMEMBERED) if cv2 is not None else served.spread_samples
    square = mean_s**2 * (1.0 + (cv2 if cv2 is not None else served.cv2 or 0.0))
    return Served(
        samples,
        served.mean_s + weight * (mean_s - served.mean_s),
        served.square + weight * (square - served.square),
        spread,
        served.batch + weight * ((batch if batch is not None else 1.0) - served.batch),
    )
