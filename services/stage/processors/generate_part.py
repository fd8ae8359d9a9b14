"""A further part of a decoder that was cut: hidden states in, hidden states or logits out, its own keys and values kept here.

The first part owns the loop; every pass of its running batch comes here with the names of the sequences, so that whoever has
joined or left there joins and leaves here. A batch keeps to one replica of each part as long as it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.manifest import StageSpec
from services.dataplane.errors import BadRequest, UpstreamFailed
from services.dataplane.wire import Array
from services.stage.processors import generate_cache
from services.stage.processors.generate_cache import Cache, attention_mask
from services.stage.processors.generate_pass import RunsGraph, cache_names, forward

PARAMETER = "session"
"""Request parameter that names the running batch and its sequences."""
MAX_BATCHES = 64
"""Running batches whose keys and values are kept; of more the one that was silent for longest is forgotten."""
IDLE_S = 60.0
"""Time [s] after which a silent one is forgotten."""


@dataclass(frozen=True, slots=True)
class Session:
    """Which sequences a pass is of."""

    batch: str
    """Name of the running batch."""
    rows: tuple[int, ...]
    past: tuple[int, ...]
    """Tokens that each had before; 0 for all where they are new."""
    others: tuple[int, ...] = ()
    """Where they are new, the sequences that the batch has beside them. A step is of all there are."""

    def to_parameter(self) -> dict[str, Any]:
        """As a request carries it."""
        return {"batch": self.batch, "rows": list(self.rows), "past": list(self.past), "others": list(self.others)}

    @classmethod
    def from_parameter(cls, value: Any) -> Session:
        """What `to_parameter` wrote.

        Raises:
            BadRequest: it is something else, or not there.
        """
        if isinstance(value, dict):
            batch, rows, past = value.get("batch"), _whole(value.get("rows")), _whole(value.get("past"))
            if isinstance(batch, str) and len(rows) == len(past) == len(set(rows)) > 0:
                return cls(batch, rows, past, _whole(value.get("others")))
        raise BadRequest(f"parameters.{PARAMETER} is missing or malformed; a part of a decoder is asked by its first part only")


@dataclass(slots=True)
class _Kept:
    """Of one running batch: groups of sequences in the order in which they joined, each only read so far, or stepped."""

    groups: list[tuple[tuple[int, ...], Cache]]
    used: float


class Part:
    """See the module. One pass at a time."""

    inline = False

    def __init__(self, spec: StageSpec, graph: RunsGraph) -> None:
        self.spec = spec
        self._graph = graph
        self._kept: dict[str, _Kept] = {}
        heads, width = int(spec.parameters["kv_heads"]), int(spec.parameters["head_dim"])
        self._names = cache_names(spec)
        self._nothing = np.zeros((1, heads, 0, width), graph.inputs[f"past_{self._names[0]}"])

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """A pass of sequences that nobody has heard of and nobody will again: for warming up."""
        x = inputs["hidden"]
        counts = np.full(len(x), x.shape[1], np.int64)
        made, _ = self._pass(x, counts, Cache(np.zeros_like(counts), self._empty(len(x))))
        return {self.spec.outputs[0].name: made}

    def proceed(self, inputs: Mapping[str, Array], session: Session, now: float) -> dict[str, Array]:
        """A pass of the sequences of a session.

        Raises:
            BadRequest: the tensors are of other sequences than the session.
            UpstreamFailed: their keys and values are not here: this replica is not the one they began with, or has forgotten.
        """
        self.forget(now)
        x, mask = inputs["hidden"], inputs["attention_mask"]
        past = np.array(session.past, dtype=np.int64)
        counts = mask.sum(axis=1) - past
        if len(x) != len(past) or counts.min() < 1 or counts.max() > x.shape[1]:
            raise BadRequest(f"the tensors do not fit parameters.{PARAMETER}")
        kept = self._kept.setdefault(session.batch, _Kept([], now))
        kept.used = now
        fresh = not past.any()
        cache = Cache(past, self._empty(len(x))) if fresh else self._found(kept, session)
        made, cache = self._pass(x, counts, cache)
        others = set(session.others) if fresh else set()
        kept.groups = [*((rows, old) for rows, old in kept.groups if not others.isdisjoint(rows)), (session.rows, cache)]
        return {self.spec.outputs[0].name: made}

    def _found(self, kept: _Kept, session: Session) -> Cache:
        wanted, groups = set(session.rows), []
        there: list[int] = []
        for rows, cache in kept.groups:
            stay = [i for i, row in enumerate(rows) if row in wanted]
            if stay:
                groups.append(generate_cache.keep(cache, stay))
                there += [rows[i] for i in stay]
        if tuple(there) == session.rows:
            joined = generate_cache.join(groups)
            if tuple(joined.lengths) == session.past:
                return joined
        raise UpstreamFailed(f"stage {self.spec.name!r} does not have these sequences (any more)", stage=self.spec.name)

    def _empty(self, batch: int) -> tuple[Array, ...]:
        return (np.repeat(self._nothing, batch, axis=0),) * len(self._names)

    def _pass(self, x: Array, counts: Array, cache: Cache) -> tuple[Array, Cache]:
        lengths = cache.lengths + counts
        mask = attention_mask(lengths, cache.past[0].shape[2] + x.shape[1])
        return forward(self._graph, self._names, {"hidden": x}, mask, lengths, cache)

    def forget(self, now: float) -> None:
        """Drop what has been silent for too long, and the most silent where there is too much."""
        old = sorted(self._kept, key=lambda name: self._kept[name].used)
        for name in old:
            if now - self._kept[name].used > IDLE_S or len(self._kept) > MAX_BATCHES:
                del self._kept[name]

    @property
    def sequences(self) -> int:
        """Kept now."""
        return sum(len(rows) for kept in self._kept.values() for rows, _ in kept.groups)

    def describe(self) -> dict[str, Any]:
        """Providers, threads, and which part it is."""
        return {**self._graph.describe(), "part": self.spec.parameters["part"], "parts": self.spec.parameters["parts"]}


def _whole(value: Any) -> tuple[int, ...]:
    """A list of whole numbers; anything else is an empty one."""
    if not isinstance(value, list) or any(type(n) is not int or n < 0 for n in value):
        return ()
    return tuple(value)
