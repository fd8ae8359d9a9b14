"""A fused service: several stages of one model computed one after another in this process, with no hop between them.

What they are together is `services.dataplane.fusing`'s to say; here they are opened, and a run hands each member's outputs on
to the members that take them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import GENERATE, Manifest, ManifestError, Precision, StageSpec, check_files
from services.dataplane import fusing
from services.dataplane.fusing import CannotFuse
from services.dataplane.wire import Array
from services.stage.processors import Exemplary, Processor, open_processor

TOKENS = 16
"""Made by a generating member at the warm-up: enough for a first law, few enough not to keep a replica from starting."""


class Fused:
    """The members in order. Inline only if all of them are; each that is meant to be stays one at a time."""

    example: Callable[[int], dict[str, Array]]
    """There only where a member is `Exemplary` or generates, and then the whole is exemplary: what shapes do not tell of a part
    they do not tell of it either."""

    def __init__(self, members: Sequence[tuple[StageSpec, Processor]]) -> None:
        self._members = members
        self.inline = all(processor.inline for _, processor in members)
        # An inline processor was written for one thread, and here the worker may have several.
        self._turns = [threading.Lock() if processor.inline else nullcontext() for _, processor in members]
        if any(isinstance(processor, Exemplary) or spec.processor == GENERATE for spec, processor in members):
            self.example = self._examples

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All that the members make, each from the nearest earlier member's outputs and from `inputs`."""
        made: dict[str, Array] = {}
        for (spec, processor), turn in zip(self._members, self._turns, strict=True):
            there = {**inputs, **made}
            taken = {tensor.name: there[tensor.name] for tensor in spec.inputs if tensor.name in there}
            with turn:
                made |= processor.run(taken)
        return made

    def _examples(self, items: int) -> dict[str, Array]:
        """Those of the members' made up inputs that come from outside."""
        found: dict[str, Array] = {}
        wires = fusing.wires([spec for spec, _ in self._members])
        for (spec, processor), sources in zip(self._members, wires, strict=True):
            if spec.processor == GENERATE:
                found["max_tokens"] = np.full(items, TOKENS, dtype=np.int64)
            if isinstance(processor, Exemplary):
                found |= {name: array for name, array in processor.example(items).items() if sources.get(name) is None}
        return found

    def describe(self) -> dict[str, Any]:
        """What each member says of itself."""
        return {fusing.MEMBERS: {spec.name: processor.describe() for spec, processor in self._members}}


def open_stages(
    model: Manifest, names: Sequence[str], precision: Precision, directory: Path, threads: int
) -> tuple[StageSpec, Processor]:
    """The stage that is to be served, opened: one of the model's own, or several of them fused.

    Args:
        model: the manifest.
        names: one stage, or the members of a fused one in order.
        precision: of the core stages; light ones of a fused stage have only float32.
        directory: where the model's files lie.
        threads: how many may work on one run.

    Raises:
        ManifestError: there is no such stage or file, or these stages cannot be fused.
    """
    if len(names) == 1:
        spec = model.stage(names[0])
        return spec, open_processor(spec, check_files(spec, precision, directory), threads)
    try:
        fused = fusing.fuse(model, names)
    except CannotFuse as error:
        raise ManifestError(f"model {model.model!r}: {', '.join(names)} cannot be fused: {error}") from None
    members = []
    for spec in map(model.stage, names):
        files = check_files(spec, fusing.precision_of(spec, precision), directory)
        members.append((spec, open_processor(spec, files, threads)))
    return fused, Fused(members)
