"""The Gamma fit: recovers what it was given, is accepted where it is right and rejected where it is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from models import fit


@given(shape=st.floats(0.3, 300), mean_s=st.floats(1e-6, 10), seed=st.integers(0, 1000))
def test_the_fit_is_that_of_greatest_likelihood(shape: float, mean_s: float, seed: int) -> None:
    times = np.random.default_rng(seed).gamma(shape, mean_s / shape, 200)
    found = fit.gamma(list(times))
    assert found.mean_s == pytest.approx(times.mean())
    assert found.cv2 == pytest.approx(1 / found.shape)

    def likelihood(k: float) -> float:
        return float(stats.gamma.logpdf(times, k, scale=found.mean_s / k).sum())

    assert likelihood(found.shape) >= max(likelihood(found.shape * 1.01), likelihood(found.shape / 1.01))
    assert found.distance == pytest.approx(
        stats.kstest(times, "gamma", args=(found.shape, 0, found.mean_s / found.shape)).statistic
    )


def test_a_gamma_sample_is_seldom_rejected_and_another_one_is() -> None:
    rng = np.random.default_rng(0)
    rejected = [fit.gamma(list(rng.gamma(2, 0.5, 150)), seed=i).rejected for i in range(40)]
    assert sum(rejected) <= 3  # 0.4 are expected
    assert fit.gamma([*rng.normal(1, 0.01, 100), *rng.normal(2, 0.01, 100)]).rejected


def test_the_level_holds_for_fitted_samples_where_the_textbooks_would_not() -> None:
    found = fit.gamma(list(np.random.default_rng(1).gamma(2, 0.5, 300)))
    assert found.critical < 1.63 / np.sqrt(300)


def test_times_that_hardly_vary_have_a_fit() -> None:
    found = fit.gamma(list(1.0 + 1e-9 * np.arange(50)))
    assert found.cv2 < 1e-11
    assert np.isfinite(found.distance)


def test_quantiles_of_sample_and_fit_agree() -> None:
    times = np.random.default_rng(2).gamma(3, 1 / 3, 5000)
    found = fit.gamma(list(times))
    assert fit.quantile_s(found, fit.QUANTILES) == pytest.approx(found.quantiles_s, rel=0.1)


@pytest.mark.parametrize("times", [[], [1.0], [1.0, 1.0], [0.0, 1.0]])
def test_what_has_no_fit_is_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two different service times"):
        fit.gamma(times)
