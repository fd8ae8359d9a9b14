"""What a stage computes: tensors in, tensors out.

`PROCESSORS` maps a manifest's `processor` to the function that opens it. Most light stages take microseconds, so they run
inline on the event loop (`inline`); an ONNX session runs in the worker's threads, and so does a light stage whose work takes
milliseconds: an image, sound. Modules are imported on first use, so that a stage that pools never loads the tokenizers, and
no light stage loads ONNX Runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class Exemplary(Protocol):
    """A processor whose inputs' types and shapes tell neither what they must hold nor how long they take: an image, sound.

    It is warmed up on its own example, and the event loop is never held for it, whatever its estimate, unless it is inline.
    """

    def example(self, items: int) -> dict[str, Array]:
        """Inputs of `items` items, as large as usual ones are."""


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
    "image": "services.stage.processors.image",
    "log_mel": "services.stage.processors.log_mel",
    "project": "services.stage.processors.project",
    "match": "services.stage.processors.match",
    "label": "services.stage.processors.label",
    "chat": "services.stage.processors.chat",
    "detokenise": "services.stage.processors.detokenise",
    "generate": "services.stage.processors.generate",
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
