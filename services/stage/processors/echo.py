"""No work at all: what came in goes out. `make bench` uses it to measure everything around the work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.manifest import ManifestError, StageSpec
from services.dataplane.wire import Array


class Echo:
    """Each output is the input at the same place in the manifest."""

    inline = True

    def __init__(self, names: tuple[tuple[str, str], ...]) -> None:
        self._names = names

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Hand the inputs back under the outputs' names."""
        return {output: inputs[name] for name, output in self._names}

    def describe(self) -> dict[str, Any]:
        """Nothing to tell."""
        return {}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Echo:
    """Pair inputs with outputs; see `services.stage.processors`."""
    del files, threads
    if [(t.datatype, t.shape) for t in spec.inputs] != [(t.datatype, t.shape) for t in spec.outputs]:
        raise ManifestError(f"stage {spec.name!r}: an echo's outputs must be like its inputs, in the same order")
    return Echo(tuple((i.name, o.name) for i, o in zip(spec.inputs, spec.outputs, strict=True)))
