"""Zero-shot classification of images: which label's text lies closest to each image, as CLIP was trained to tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import StageSpec
from services.dataplane.wire import Array
from services.stage.processors.pool import unit


class Match:
    """`image_embedding` [batch, p], `label_embeddings` [labels, p], `labels` [labels] -> `scores` [batch, labels], `label`.

    Scores are softmax(scale x cosine) over the labels, CLIP's probabilities; the label is the one with the highest, the first
    one among equals.
    """

    inline = True

    def __init__(self, scale: float) -> None:
        self._scale = np.float32(scale)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compare and choose."""
        logits = self._scale * (unit(inputs["image_embedding"]) @ unit(inputs["label_embeddings"]).T)
        return {"scores": softmax(logits), "label": inputs["labels"][np.argmax(logits, axis=1)]}

    def describe(self) -> dict[str, Any]:
        """The measure used."""
        return {"similarity": "cosine", "scale": float(self._scale)}


def softmax(logits: Array) -> Array:
    """exp(x_i) / sum_j exp(x_j) over the last axis; FP32 in and out, the same shape."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: Array = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Match:
    """Read the scale, exp(logit_scale) of the checkpoint; see `services.stage.processors`."""
    del files, threads
    return Match(float(spec.parameters["scale"]))
