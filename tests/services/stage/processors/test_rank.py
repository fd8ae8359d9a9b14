"""Ranking documents on vectors small enough to check by eye."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import StageSpec, TensorSpec
from services.dataplane.wire import Array
from services.stage.processors import open_processor

SPEC = StageSpec(
    name="rank",
    tier="light",
    processor="rank",
    inputs=(
        TensorSpec(name="query_embedding", datatype="FP32", shape=("queries", 2)),
        TensorSpec(name="document_embeddings", datatype="FP32", shape=("documents", 2)),
    ),
    outputs=(
        TensorSpec(name="scores", datatype="FP32", shape=("queries", "documents")),
        TensorSpec(name="order", datatype="INT64", shape=("queries", "documents")),
    ),
)


def rank(queries: list[list[float]], documents: list[list[float]]) -> dict[str, Array]:
    return open_processor(SPEC, (), 1).run(
        {"query_embedding": np.array(queries, np.float32), "document_embeddings": np.array(documents, np.float32)}
    )


@pytest.mark.parametrize(
    ("sentence", "queries", "documents", "order"),
    [
        ("the nearest first", [[1, 0]], [[0, 1], [1, 0], [1, 1]], [[1, 2, 0]]),
        ("the opposite last", [[1, 0]], [[-1, 0], [0, 1], [1, 1]], [[2, 1, 0]]),
        ("equals as they came", [[1, 0]], [[0, 1], [1, 0], [2, 0], [0, 5], [1, 0]], [[1, 2, 4, 0, 3]]),
        ("each query by itself", [[1, 0], [0, 1]], [[1, 0], [0, 1]], [[0, 1], [1, 0]]),
        ("one document is first", [[1, 0]], [[0, 1]], [[0]]),
        ("a query of nothing leaves all as it came", [[0, 0]], [[0, 1], [1, 0]], [[0, 1]]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows(sentence: str, queries: list[list[float]], documents: list[list[float]], order: list[list[int]]) -> None:
    del sentence
    outputs = rank(queries, documents)
    assert outputs["order"].tolist() == order
    assert outputs["order"].dtype == np.int64
    assert outputs["scores"].dtype == np.float32


def test_scores_are_cosines_in_the_order_the_documents_came() -> None:
    scores = rank([[2, 0]], [[0, 1], [3, 0], [1, 1], [-1, 0]])["scores"]
    np.testing.assert_allclose(scores, [[0, 1, 0.70710678, -1]], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    queries=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=3),
    documents=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=6),
)
def test_the_order_sorts_the_scores_and_keeps_ties(queries: list[list[float]], documents: list[list[float]]) -> None:
    outputs = rank(queries, documents)
    for scores, order in zip(outputs["scores"], outputs["order"], strict=True):
        assert sorted(order.tolist()) == list(range(len(documents)))
        assert order.tolist() == sorted(range(len(documents)), key=lambda i: -scores[i])
