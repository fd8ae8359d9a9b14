"""The head of a text classifier: the first token's state to a score per class, and the name of the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.manifest import ManifestError, StageSpec
from services.dataplane.wire import Array
from services.stage.processors.match import softmax
from services.stage.processors.project import Dense, dense_of, load_arrays, sigmoid


def _as_they_are(logits: Array) -> Array:
    return logits


SCORES: Mapping[str, Callable[[Array], Array]] = {
    "single_label_classification": softmax,
    "multi_label_classification": sigmoid,
    "regression": _as_they_are,
}
"""What makes scores of logits, by the checkpoint's `problem_type`."""


class Label:
    """`last_hidden_state` FP32 [batch, seq, d] -> `logits`, `scores` FP32 [batch, classes], `label` BYTES [batch].

    Scores are probabilities: of one class among all, or of each class by itself where several may hold at once. A regression's
    are its values. The label is the name of the class with the highest logit, the first one among equals.
    """

    inline = True

    def __init__(self, dense: Dense, names: Sequence[str], problem: str) -> None:
        self._dense = dense
        self._names = np.array([name.encode() for name in names], dtype=object)
        self._problem = problem

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Score and choose."""
        logits = self._dense(inputs["last_hidden_state"][:, 0])
        return {
            "logits": logits,
            "scores": SCORES[self._problem](logits),
            "label": self._names[np.argmax(logits, axis=1)],
        }

    def describe(self) -> dict[str, Any]:
        """The classes, in the order of the scores."""
        return {"labels": [name.decode() for name in self._names], "problem": self._problem}


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Label:
    """Load the weights; see `services.stage.processors`.

    Parameters: `id2label` (names in the order of the classes), `problem` one of SCORES, `activation` between the layers. The
    file is as `project`'s, without a layer norm.
    """
    del threads
    names, problem = spec.parameters["id2label"], spec.parameters["problem"]
    if problem not in SCORES:
        raise ManifestError(f"stage {spec.name!r}: problem {problem!r} is not one of {', '.join(SCORES)}")
    dense = dense_of(spec, load_arrays(spec, files), spec.parameters.get("activation"))
    if dense.widths != (spec.inputs[0].shape[-1], len(names)):
        raise ManifestError(
            f"{files[0].name} leads from {dense.widths[0]} numbers to {dense.widths[1]} classes, not from "
            f"{spec.inputs[0].shape[-1]} to {len(names)} as the manifest says; export the model again"
        )
    return Label(dense, names, problem)
