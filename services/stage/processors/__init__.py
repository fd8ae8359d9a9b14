"""What a stage computes: tensors in, tensors out.

`PROCESSORS` maps a manifest's `processor` to the function that opens it. A light stage's work takes microseconds, so it runs
inline on the event loop (`inline`); an ONNX session runs in the worker's threads. Modules are imported on first use, so that a
stage that pools never loads the tokenizers, and no light stage loads ONNX Runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from models.manifest import ManifestError, StageSpec
from services.dataplane.wire import Array


class Processor(Protocol):
    """A stage's work. `run` may be called from several threads at once unless `inline` is set."""

    inline: bool

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs already checked against the manifest.

        Raises:
            TaskError: the values, rather than their types and shapes, cannot be served.
        """

    def describe(self) -> dict[str, Any]:
        """What runs the stage, for its metadata: provider, threads, precision."""


class OpenProcessor(Protocol):
    """Opens a processor on a stage's files."""

    def __call__(self, spec: StageSpec, files: tuple[Path, ...], threads: int) -> Processor:
        """Load; `threads` is how many may work on one run."""


PROCESSORS: Mapping[str, str] = {
    "onnx": "services.stage.session",
    "tokenise": "services.stage.processors.tokenise",
    "pool": "services.stage.processors.pool",
    "classify": "services.stage.processors.classify",
    "rank": "services.stage.processors.rank",
    "echo": "services.stage.processors.echo",
}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Processor:
    """The processor the manifest names.

    Raises:
        ManifestError: there is none of that name, or it cannot open the files.
    """
    module = PROCESSORS.get(spec.processor)
    if module is None:
        raise ManifestError(
            f"stage {spec.name!r} wants processor {spec.processor!r}; this version has {', '.join(sorted(PROCESSORS))}"
        )
    opener: OpenProcessor = importlib.import_module(module).open_processor
    return opener(spec, files, threads)
