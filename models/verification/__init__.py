"""Proves that an export's chained stages equal the whole PyTorch model, on inputs that are meant to find a difference.

The reference is what a user of the checkpoint would run: its own tokenizer and processors, the whole model as `from_pretrained`
gives it, in torch. The chain is what replicas would run: the exported files with the manifest's parameters. Light stages'
arithmetic is repeated here in a few lines of numpy, because their processors live in `services`, a floor up; `tests/services`
holds those to the same references. One module per family, chosen by the manifest.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from models.checkpoint import Checkpoint, resolve
from models.directory import Report
from models.errors import UnsupportedCheckpoint
from models.manifest import Manifest, load
from models.verification.figures import Figure, Verdict


class Compare(Protocol):
    """Compares one family's stages, in every precision exported, with the checkpoint."""

    def __call__(
        self, manifest: Manifest, directory: Path, checkpoint: Checkpoint, rng: np.random.Generator, report: Report
    ) -> list[Figure]:
        """Figures in the order to show them; `rng` is of the random inputs.

        Raises:
            ManifestError: a file differs from its sha256.
            CheckpointError: the checkpoint cannot be read, or is not of the export's dimensions.
            StageBroken: ONNX Runtime cannot open or run a file.
        """


FAMILIES: Mapping[str, str] = {
    "bert": "sentence",
    "bert-classifier": "heads",
    "clip": "clip",
    "whisper": "whisper",
    "llama": "llama",
    "llava": "llava",
}
"""Family -> module of this package, whose `compare` does it."""


def verify(directory: Path, source: str, seed: int = 0, report: Report = lambda _: None) -> Verdict:
    """Compare an export with the model it was made from, in every precision it holds.

    Args:
        directory: Of the export.
        source: The checkpoint, as `checkpoint.resolve` takes it.
        seed: Of the random inputs.
        report: Told what is being done.

    Raises:
        ManifestError: no export there, or a file differs from its sha256.
        CheckpointError: the checkpoint cannot be read, or is not of the export's dimensions.
        StageBroken: ONNX Runtime cannot open or run a file.
    """
    manifest = load(directory)
    if manifest.family not in FAMILIES:
        raise UnsupportedCheckpoint(f"{directory}: family {manifest.family!r} is not one of {', '.join(FAMILIES)}")
    checkpoint = resolve(source, report)
    compare: Compare = importlib.import_module(f"models.verification.{FAMILIES[manifest.family]}").compare
    figures = compare(manifest, directory, checkpoint, np.random.default_rng(seed), report)
    return Verdict(manifest, checkpoint.source, tuple(figures))
