"""Keys and values of a batch of sequences of unequal length, and how sequences join and leave it. Pure numpy.

Left-padded: the newest token of every sequence is the last column, so one step of the graph serves all, and a mask follows from
the lengths alone. What lies under padding is zeros, which the graph masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.dataplane.wire import Array


@dataclass(frozen=True, slots=True)
class Cache:
    """What a decoder keeps of the tokens it has seen."""

    lengths: Array
    """(batch,) int64: tokens of each sequence."""
    past: tuple[Array, ...]
    """Per layer keys and values, each (batch, kv_heads, longest, head_dim)."""
    cross: tuple[Array, ...] = ()
    """Per layer keys and values of the encoder's states, each (batch, heads, positions, head_dim); none without an encoder."""

    def __len__(self) -> int:
        """Sequences in the batch."""
        return len(self.lengths)


def attention_mask(lengths: Array, total: int) -> Array:
    """(batch, total) int64: 0 where a sequence is padded on the left, 1 for its tokens."""
    return (np.arange(total) >= total - lengths[:, None]).astype(np.int64)


def join(caches: Sequence[Cache]) -> Cache:
    """One batch of several, in that order, padded to the longest sequence."""
    if len(caches) == 1:
        return caches[0]
    longest = max(int(cache.lengths.max()) for cache in caches)
    return Cache(
        np.concatenate([cache.lengths for cache in caches]),
        tuple(_stacked(arrays, longest) for arrays in zip(*(cache.past for cache in caches), strict=True)),
        tuple(np.concatenate(arrays) for arrays in zip(*(cache.cross for cache in caches), strict=True)),
    )


def keep(cache: Cache, rows: Sequence[int]) -> Cache:
    """The batch without all rows but these, and without the columns that only the others needed."""
    if len(rows) == len(cache):
        return cache
    index = np.array(rows, dtype=np.int64)
    lengths = cache.lengths[index]
    longest = int(lengths.max())
    return Cache(
        lengths,
        tuple(np.ascontiguousarray(array[index, :, array.shape[2] - longest :]) for array in cache.past),
        tuple(array[index] for array in cache.cross),
    )


def _stacked(arrays: Sequence[Array], longest: int) -> Array:
    _, heads, _, width = arrays[0].shape
    stacked = np.zeros((sum(len(array) for array in arrays), heads, longest, width), arrays[0].dtype)
    start = 0
    for array in arrays:
        # A batch whose longest sequence has left may be wider than it needs to be.
        used = min(array.shape[2], longest)
        stacked[start : start + len(array), :, longest - used :] = array[:, :, array.shape[2] - used :]
        start += len(array)
    return stacked
