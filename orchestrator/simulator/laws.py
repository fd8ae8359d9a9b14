"""How service times vary around their mean, and the random streams that they are drawn from.

A noise draws factors of mean 1; the mean itself is the stage's `ServiceLaw`, which knows the batch. Streams are named, as those
of `loadgen.arrivals` are: what one service draws does not hang on what others are there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

CHUNK = 1024
"""Factors drawn at once."""


class Noise(Protocol):
    """A law of factors with mean 1."""

    @property
    def cv2(self) -> float:
        """Squared coefficient of variation of the factors."""

    def factors(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Independent factors >= 0, shape (count,)."""


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma factors with mean 1 and squared coefficient of variation cv2: shape 1/cv2, scale cv2.

    cv2 >= 0: 0 no noise at all, 1 exponential.
    """

    cv2: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.cv2 < math.inf:
            raise ValueError(f"cv2 is {self.cv2}; a squared coefficient of variation is 0 or more")

    def factors(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """See Noise; draws nothing where cv2 is 0."""
        return rng.gamma(1 / self.cv2, self.cv2, count) if self.cv2 else np.ones(count)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Factors drawn from service times of a recorded run, each over their mean. `seconds` > 0 [s]."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds or not all(0 < s < math.inf for s in self.seconds):
            raise ValueError("recorded service times must be positive, and at least one")

    @property
    def cv2(self) -> float:
        """See Noise."""
        values = np.array(self.seconds)
        return float(values.var() / values.mean() ** 2)

    def factors(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """See Noise."""
        values = np.array(self.seconds)
        return rng.choice(values / values.mean(), count)


def stream(seed: int, name: str) -> np.random.Generator:
    """The random stream of that name."""
    digest = hashlib.sha256(f"simulator/{name}".encode()).digest()
    key = tuple(int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def endless(noise: Noise, rng: np.random.Generator) -> Iterator[float]:
    """Factors one by one, for ever; as plain floats, drawn in chunks, which is many times faster than one at a time."""
    while True:
        yield from noise.factors(rng, CHUNK).tolist()
