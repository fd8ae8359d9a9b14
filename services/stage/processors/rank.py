"""Retrieval: documents in the order of their similarity to each query."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import StageSpec
from services.dataplane.wire import Array
from services.stage.processors.pool import unit


class Rank:
    """`query_embedding` [queries, d], `document_embeddings` [documents, d] -> `scores`, `order` [queries, documents].

    Scores are cosines in the order the documents came; `order` lists their indices best first, equals as they came.
    """

    inline = True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compare and sort."""
        scores = unit(inputs["query_embedding"]) @ unit(inputs["document_embeddings"]).T
        return {"scores": scores, "order": np.argsort(-scores, axis=1, kind="stable").astype(np.int64)}

    def describe(self) -> dict[str, Any]:
        """The measure used."""
        return {"similarity": "cosine"}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Rank:
    """Nothing to load; see `services.stage.processors`."""
    del spec, files, threads
    return Rank()
