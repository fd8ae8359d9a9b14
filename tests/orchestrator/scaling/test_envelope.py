from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scaling.envelope import envelope, peak

rates = st.lists(st.integers(0, 1000), max_size=40)


def test_by_hand() -> None:
    assert envelope([1.0, 5.0, 3.0, 0.0, 2.0]) == (5.0, 4.0, 2.5)
    assert envelope([]) == ()
    assert peak([], 3) == 0.0
    assert peak([2.0, 4.0], 5) == 3.0


@given(rates, st.integers(1, 50))
def test_a_peak_is_that_of_every_window(rates: list[int], width: int) -> None:
    windows = [rates[i : i + width] for i in range(max(1, len(rates) - width + 1))]
    assert peak(rates, width) == max(sum(window) / len(window) for window in windows) if rates else True


@given(rates)
def test_longer_windows_have_lower_rates(rates: list[int]) -> None:
    found = envelope(rates)
    assert all(longer <= shorter + 1e-9 for shorter, longer in pairwise(found))
