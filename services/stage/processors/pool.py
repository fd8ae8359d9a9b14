"""Token states to one embedding per text, as the sentence encoder was trained to be pooled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import ManifestError, StageSpec
from services.dataplane.wire import Array

MODES = ("mean", "cls")


class Pool:
    """`last_hidden_state` FP32 [batch, seq, d], `attention_mask` INT64 [batch, seq] -> `embedding` FP32 [batch, d]."""

    inline = True

    def __init__(self, mode: str, normalise: bool) -> None:
        self._mode = mode
        self._normalise = normalise

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Mean over the tokens of the mask, or the first token; unit length if the model was trained so."""
        states, mask = inputs["last_hidden_state"], inputs["attention_mask"]
        if self._mode == "cls":
            embedding = states[:, 0]
        else:
            # One matrix product instead of a masked copy of the states.
            total = np.matmul(mask[:, None, :].astype(np.float32), states)[:, 0]
            embedding = total / np.maximum(mask.sum(axis=1, keepdims=True), 1).astype(np.float32)
        return {"embedding": unit(embedding) if self._normalise else embedding}

    def describe(self) -> dict[str, Any]:
        """Pooling mode."""
        return {"mode": self._mode, "normalise": self._normalise}


def unit(vectors: Array) -> Array:
    """Rows scaled to length 1; a row of zeros stays one. Shape (n, d) in and out."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Array = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Pool:
    """Read the mode; see `services.stage.processors`."""
    del files, threads
    mode = spec.parameters.get("mode", "mean")
    if mode not in MODES:
        raise ManifestError(f"stage {spec.name!r}: pooling mode {mode!r} is not one of {', '.join(MODES)}")
    return Pool(mode, bool(spec.parameters.get("normalise", True)))
