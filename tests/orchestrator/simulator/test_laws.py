from __future__ import annotations

import itertools

import numpy as np
import pytest

from orchestrator.simulator.laws import Gamma, Noise, Recorded, endless, stream


@pytest.mark.parametrize("cv2", [0.0, 0.3, 1.0, 4.0])
def test_gamma_has_mean_1_and_its_cv2(cv2: float) -> None:
    factors = Gamma(cv2).factors(stream(1, "x"), 200_000)
    assert factors.mean() == pytest.approx(1.0, abs=0.02)
    assert factors.var() == pytest.approx(cv2, rel=0.05, abs=1e-12)


def test_recorded_times_come_as_multiples_of_their_mean() -> None:
    factors = Recorded((1.0, 3.0)).factors(stream(1, "x"), 1000)
    assert set(factors.tolist()) == {0.5, 1.5}


@pytest.mark.parametrize("make", [lambda: Gamma(-1.0), lambda: Recorded(()), lambda: Recorded((0.0,))])
def test_impossible_noise_is_refused(make: type[Noise]) -> None:
    with pytest.raises(ValueError, match=r"cv2 is -1|must be positive"):
        make()


def test_streams_hang_on_seed_and_name_only() -> None:
    draws = [stream(seed, name).random() for seed, name in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_factors_never_end_and_are_those_of_the_chunks() -> None:
    drawn = list(itertools.islice(endless(Gamma(1.0), stream(1, "x")), 2000))
    rng = stream(1, "x")
    assert drawn == np.concatenate([Gamma(1.0).factors(rng, 1024) for _ in range(2)])[:2000].tolist()


def test_every_noise_says_how_much_it_varies() -> None:
    assert Gamma(0.7).cv2 == 0.7
    assert Recorded((1.0, 3.0)).cv2 == pytest.approx(0.25)
