"""Cutting a stack of layers: everything once and in order, and no cut has a cheaper worst part."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.adapters.layers import part_name, split, work
from models.errors import UnsupportedCheckpoint

_costs = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@given(costs=_costs, before=st.integers(0, 20), after=st.integers(0, 20), data=st.data())
def test_no_other_cut_has_a_cheaper_worst_part(costs: list[int], before: int, after: int, data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    found = split(costs, parts, before, after)
    assert [i for part in found for i in part] == list(range(len(costs)))
    assert all(found)
    assert len(found) == parts

    def worst(ends: tuple[int, ...]) -> int:
        sums = [sum(costs[start:end]) for start, end in zip((0, *ends), (*ends, len(costs)), strict=True)]
        sums[0] += before
        sums[-1] += after
        return max(sums)

    best = min(worst(ends) for ends in combinations(range(1, len(costs)), parts - 1))
    assert worst(tuple(part.stop for part in found[:-1])) == best


def test_more_parts_than_layers_are_refused() -> None:
    with pytest.raises(UnsupportedCheckpoint, match="2 layers cannot be cut into 3 parts; ask for 2 at most"):
        split([1, 1], 3)


def test_work_counts_what_multiplies() -> None:
    layer = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Embedding(100, 5), nn.Conv2d(1, 2, 4))
    assert work(layer) == 15 + 32


def test_only_parts_are_numbered() -> None:
    assert [part_name("encode", i, parts) for i, parts in ((0, 1), (0, 2), (1, 2))] == ["encode", "encode-1", "encode-2"]
