"""Zero-shot classification: how close a text's embedding is to each label's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import StageSpec
from services.dataplane.wire import Array
from services.stage.processors.pool import unit


class Classify:
    """`embedding` [batch, d], `label_embeddings` [labels, d], `labels` [labels] -> `scores` [batch, labels], `label` [batch].

    Scores are cosines; the label is the text with the highest, the first one among equals.
    """

    inline = True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compare and choose."""
        scores = unit(inputs["embedding"]) @ unit(inputs["label_embeddings"]).T
        return {"scores": scores, "label": inputs["labels"][np.argmax(scores, axis=1)]}

    def describe(self) -> dict[str, Any]:
        """The measure used."""
        return {"similarity": "cosine"}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Classify:
    """Nothing to load; see `services.stage.processors`."""
    del spec, files, threads
    return Classify()
