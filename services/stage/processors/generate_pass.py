"""One pass through a decoder's graph, or through that of a part of one: names of inputs, masks, positions. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from models.manifest import StageSpec
from services.dataplane.wire import Array
from services.stage.processors.generate_cache import Cache


class RunsGraph(Protocol):
    """The part of `services.stage.session.Graph` that a decoder needs."""

    inputs: Mapping[str, np.dtype[Any]]
    outputs: tuple[str, ...]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Outputs by name."""

    def describe(self) -> dict[str, Any]:
        """Providers and threads."""


def cache_names(spec: StageSpec) -> list[str]:
    """What the keys and values of the layers are called in a graph, behind `past_`, `present_` and `cross_`."""
    return [f"{i}_{what}" for i in range(int(spec.parameters["layers"])) for what in ("key", "value")]


def positions(mask: Array, new: int) -> Array:
    """(batch, new) int64: places of the newest tokens of left-padded sequences, 0 under the padding."""
    places: Array = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return places[:, -new:]


def forward(
    graph: RunsGraph, names: Sequence[str], new: Mapping[str, Array], mask: Array, lengths: Array, cache: Cache
) -> tuple[Array, Cache]:
    """One pass through a graph: what it makes of the new tokens, and the cache with them.

    Args:
        graph: of a decoder, or of a part of one.
        names: see `cache_names`.
        new: the new tokens (batch, new, d), by the name of the input that takes them.
        mask: (batch, total), see `generate_cache.attention_mask`.
        lengths: (batch,) tokens of each sequence, the new ones included.
        cache: of the tokens before.
    """
    feed = {**new, "attention_mask": mask}
    if "position_ids" in graph.inputs:
        (x,) = new.values()
        feed["position_ids"] = positions(mask, x.shape[1])
    feed |= {f"past_{name}": array for name, array in zip(names, cache.past, strict=True)}
    feed |= {f"cross_{name}": array for name, array in zip(names, cache.cross, strict=False)}
    made = graph.run(feed)
    return made[graph.outputs[0]], Cache(lengths, tuple(made[f"present_{name}"] for name in names), cache.cross)
