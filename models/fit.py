"""Fits a Gamma distribution to service times, and says how well it fits: the evidence behind calling light stages stochastic.

The distance is Kolmogorov's and Smirnov's; what is too large for chance is found by drawing samples from the fit and fitting
those alike, because a distribution fitted to the sample at hand is nearer to it than the textbook's table allows for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from models.manifest import GammaFit

Array = np.ndarray[Any, np.dtype[np.float64]]
LEVEL = 0.01
"""A good fit is rejected by chance this often."""
REPLICATES = 400
QUANTILES = tuple(round(0.05 * i, 2) for i in range(1, 20))
_NEWTON_STEPS = 12
_HARDLY = 1e-5


def gamma(times_s: Sequence[float], seed: int = 0) -> GammaFit:
    """The Gamma distribution of greatest likelihood for these service times.

    Args:
        times_s: At least two, all > 0, not all the same [s].
        seed: Of the samples that say what is too far.

    Raises:
        ValueError: too few times, or no spread to fit.
    """
    times = np.asarray(times_s, np.float64)
    if len(times) < 2 or not times.min() > 0 or np.ptp(times) == 0:
        raise ValueError("a Gamma distribution needs at least two different service times, all over 0")
    shape = float(_shapes(times[None])[0])
    rng = np.random.default_rng(seed)
    replicas = rng.gamma(shape, 1 / shape, (REPLICATES, len(times)))
    return GammaFit(
        samples=len(times),
        mean_s=float(times.mean()),
        shape=shape,
        distance=float(_distances(times[None])[0]),
        critical=float(np.quantile(_distances(replicas), 1 - LEVEL)),
        quantiles_s=tuple(float(time) for time in np.quantile(times, QUANTILES)),
    )


def quantile_s(fit: GammaFit, shares: Sequence[float]) -> Array:
    """Quantiles of the fitted distribution [s]."""
    found: Array = special.gammaincinv(fit.shape, np.asarray(shares)) * fit.mean_s / fit.shape
    return found


def _shapes(samples: Array) -> Array:
    """Shape parameter k of greatest likelihood of each row: log k - digamma(k) = log(mean) - mean(log), by Newton's method."""
    gap = np.maximum(np.log(samples.mean(axis=1)) - np.log(samples).mean(axis=1), 1e-12)
    k: Array = (3 - gap + np.sqrt((gap - 3) ** 2 + 24 * gap)) / (12 * gap)
    for _ in range(_NEWTON_STEPS):
        # In log k, where the equation is nearly a line, so that no step leads below 0. Of times that hardly vary the start is
        # exact enough, and a step would be a difference of nothing but rounding.
        step = (np.log(k) - special.digamma(k) - gap) / (k * special.polygamma(1, k) - 1)
        k = k * np.exp(np.where(gap > _HARDLY, step, 0.0))
    return k


def _distances(samples: Array) -> Array:
    """Kolmogorov-Smirnov distance of each row from the Gamma distribution fitted to it."""
    k, count = _shapes(samples)[:, None], samples.shape[1]
    reached = special.gammainc(k, np.sort(samples, axis=1) * k / samples.mean(axis=1, keepdims=True))
    above = np.arange(1, count + 1) / count - reached
    below = reached - np.arange(count) / count
    farthest: Array = np.maximum(above.max(axis=1), below.max(axis=1))
    return farthest
