"""Zero-shot classification on vectors small enough to check by eye."""

from __future__ import annotations

import numpy as np
import pytest

from models.manifest import StageSpec, TensorSpec
from services.dataplane.wire import Array
from services.stage.processors import open_processor

SPEC = StageSpec(
    name="classify",
    tier="light",
    processor="classify",
    inputs=(
        TensorSpec(name="embedding", datatype="FP32", shape=("batch", 2)),
        TensorSpec(name="label_embeddings", datatype="FP32", shape=("labels", 2)),
        TensorSpec(name="labels", datatype="BYTES", shape=("labels",)),
    ),
    outputs=(
        TensorSpec(name="scores", datatype="FP32", shape=("batch", "labels")),
        TensorSpec(name="label", datatype="BYTES", shape=("batch",)),
    ),
)


def classify(embedding: list[list[float]], labels: dict[bytes, list[float]]) -> dict[str, Array]:
    names = np.empty(len(labels), object)
    names[:] = list(labels)
    return open_processor(SPEC, (), 1).run(
        {
            "embedding": np.array(embedding, np.float32),
            "label_embeddings": np.array(list(labels.values()), np.float32),
            "labels": names,
        }
    )


@pytest.mark.parametrize(
    ("sentence", "embedding", "labels", "scores", "label"),
    [
        ("the label that points the same way", [[1, 0]], {b"x": [1, 0], b"y": [0, 1]}, [[1, 0]], [b"x"]),
        ("length does not matter, only direction", [[0, 9]], {b"x": [9, 0], b"y": [0, 0.1]}, [[0, 1]], [b"y"]),
        ("opposite is least", [[1, 0]], {b"x": [-1, 0], b"y": [0, 1]}, [[-1, 0]], [b"y"]),
        ("between", [[1, 1]], {b"x": [1, 0]}, [[0.70710678]], [b"x"]),
        ("the first among equals", [[1, 0]], {b"b": [1, 0], b"a": [1, 0], b"c": [2, 0]}, [[1, 1, 1]], [b"b"]),
        ("each text by itself", [[1, 0], [0, 1]], {b"x": [1, 0], b"y": [0, 1]}, [[1, 0], [0, 1]], [b"x", b"y"]),
        ("a text of nothing is like nothing", [[0, 0]], {b"x": [1, 0], b"y": [0, 1]}, [[0, 0]], [b"x"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows(
    sentence: str, embedding: list[list[float]], labels: dict[bytes, list[float]], scores: list[list[float]], label: list[bytes]
) -> None:
    del sentence
    outputs = classify(embedding, labels)
    np.testing.assert_allclose(outputs["scores"], scores, atol=1e-6)
    assert outputs["scores"].dtype == np.float32
    assert outputs["label"].tolist() == label


def test_labels_come_back_as_the_bytes_they_were() -> None:
    assert classify([[1, 0]], {b"\xff\x00": [1, 0]})["label"].tolist() == [b"\xff\x00"]
