"""Pooling against a plain reference written in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.manifest import ManifestError, StageSpec, TensorSpec
from services.dataplane.wire import Array
from services.stage.processors import Processor, open_processor
from services.stage.processors.pool import unit


def pool(**parameters: Any) -> Processor:
    spec = StageSpec(
        name="pool",
        tier="light",
        processor="pool",
        inputs=(
            TensorSpec(name="last_hidden_state", datatype="FP32", shape=("batch", "seq", 4)),
            TensorSpec(name="attention_mask", datatype="INT64", shape=("batch", "seq")),
        ),
        outputs=(TensorSpec(name="embedding", datatype="FP32", shape=("batch", 4)),),
        parameters=parameters,
    )
    return open_processor(spec, (), 1)


def embed(processor: Processor, states: Array, mask: Array) -> Array:
    return processor.run({"last_hidden_state": states, "attention_mask": mask})["embedding"]


def reference(states: Array, mask: Array, *, normalise: bool) -> list[list[float]]:
    rows: list[list[float]] = []
    for tokens, kept in zip(states, mask, strict=True):
        row = [0.0] * states.shape[2]
        for token, keep in zip(tokens, kept, strict=True):
            if keep:
                row = [total + float(x) for total, x in zip(row, token, strict=True)]
        row = [total / max(int(sum(kept)), 1) for total in row]
        length = math.sqrt(sum(x * x for x in row))
        rows.append([x / length for x in row] if normalise and length else row)
    return rows


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 4), seq=st.integers(1, 9), normalise=st.booleans())
def test_the_mean_over_the_mask_equals_a_plain_reference(seed: int, batch: int, seq: int, normalise: bool) -> None:
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(batch, seq, 4)).astype(np.float32)
    mask = rng.integers(0, 2, (batch, seq))
    embedding = embed(pool(mode="mean", normalise=normalise), states, mask)
    np.testing.assert_allclose(embedding, np.array(reference(states, mask, normalise=normalise)), atol=1e-4)
    assert embedding.dtype == np.float32


def test_padding_changes_nothing() -> None:
    states = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    short = embed(pool(), states[:, :3], mask[:, :3])
    states[:, 3:] = 1e6
    np.testing.assert_allclose(embed(pool(), states, mask), short, rtol=1e-6)


def test_a_mask_of_zeros_gives_zeros_and_no_warning() -> None:
    for normalise in (True, False):
        embedding = embed(pool(normalise=normalise), np.ones((2, 3, 4), np.float32), np.array([[0, 0, 0], [1, 1, 1]]))
        assert embedding[0].tolist() == [0, 0, 0, 0]
        assert np.isfinite(embedding).all()


def test_cls_takes_the_first_token_whatever_the_mask() -> None:
    states = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    embedding = embed(pool(mode="cls", normalise=False), states, np.zeros((2, 3), np.int64))
    assert embedding.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]


def test_embeddings_have_length_one_unless_told_otherwise() -> None:
    states, mask = np.full((1, 2, 4), 3, np.float32), np.ones((1, 2), np.int64)
    assert embed(pool(), states, mask).tolist() == [[0.5] * 4]
    assert embed(pool(normalise=False), states, mask).tolist() == [[3.0] * 4]


def test_inputs_are_left_as_they_came() -> None:
    states, mask = np.ones((1, 2, 4), np.float32), np.ones((1, 2), np.int64)
    states.flags.writeable = mask.flags.writeable = False  # as they are when they come off the wire
    embed(pool(), states, mask)
    embed(pool(mode="cls"), states, mask)


def test_an_unknown_mode_does_not_open() -> None:
    with pytest.raises(ManifestError, match="pooling mode 'max' is not one of mean, cls"):
        pool(mode="max")


def test_it_says_how_it_pools() -> None:
    assert pool(mode="cls").describe() == {"mode": "cls", "normalise": True}
    assert pool().inline


def test_unit_rows() -> None:
    rows = unit(np.array([[3, 4], [0, 0], [-2, 0]], np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0], [-1.0, 0.0]], atol=1e-6)
    assert rows.dtype == np.float32
