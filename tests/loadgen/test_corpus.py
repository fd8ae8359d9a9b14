from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.corpus import LONGEST, SHORTEST, SMALL_LENGTHS, InputSpec, describe, payload, text
from loadgen.errors import SpecError
from services.dataplane.wire import DTYPES, Limits, Message, Tensor, decode_request, encode_request


def drawn(*inputs: InputSpec, seed: int = 1) -> list[Tensor]:
    return list(payload(inputs, np.random.default_rng(seed)))


def test_lengths_are_mixed_and_mostly_between_10_and_40_words() -> None:
    rng = np.random.default_rng(1)
    words = np.array([len(text(rng).split()) for _ in range(3000)])
    assert words.min() >= SHORTEST
    assert words.max() <= LONGEST
    assert np.mean((words >= 10) & (words <= 40)) > 0.6
    assert len(np.unique(words)) > 50


def test_texts_hardly_ever_repeat_and_follow_the_seed() -> None:
    first, again, other = ([text(rng) for _ in range(500)] for rng in map(np.random.default_rng, (1, 1, 2)))
    assert first == again
    assert len(set(first) | set(other)) > 990


@given(st.integers(0, 2**32))
def test_every_text_is_short_enough_words_and_starts_large(seed: int) -> None:
    written = text(np.random.default_rng(seed))
    assert SHORTEST <= len(written.split()) <= LONGEST
    assert written[0].isupper()
    assert written.isascii()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("text", 1, 1), ("labels", 2, 6), ("query", 1, 1), ("documents", 3, 8), ("anything", 1, 1)],
)
def test_a_bytes_input_has_as_many_texts_as_its_name_suggests(name: str, least: int, most: int) -> None:
    counts = set()
    for seed in range(60):
        (tensor,) = drawn(InputSpec(name, "BYTES", (-1,)), seed=seed)
        assert all(element for element in tensor.array)
        counts.add(len(tensor.array))
    assert (min(counts), max(counts)) == (least, most)


def test_labels_of_one_task_differ() -> None:
    for seed in range(60):
        (tensor,) = drawn(InputSpec("labels", "BYTES", (-1,)), seed=seed)
        assert len(set(tensor.array)) == len(tensor.array)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((-1, 1), (2, 6)), ((1, -1), (2, 6)), ((3,), (3, 3)), ((), (1, 1)), ((-1, -1), (2, 6)), ((10,), (10, 10))],
)
def test_a_declared_shape_is_kept(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    for seed in range(20):
        (tensor,) = drawn(InputSpec("labels", "BYTES", shape), seed=seed)
        assert len(tensor.array.shape) == len(shape)
        assert all(length in (-1, actual) for length, actual in zip(shape, tensor.array.shape, strict=True) if length >= 0)
        assert expected[0] <= tensor.array.size <= expected[1]


def test_numeric_inputs_of_one_task_agree_on_their_variable_axes() -> None:
    ids, mask, hidden = drawn(
        InputSpec("input_ids", "INT64", (-1, -1)),
        InputSpec("attention_mask", "INT64", (-1, -1)),
        InputSpec("hidden", "FP32", (-1, -1, 8)),
    )
    assert ids.array.shape == mask.array.shape == hidden.array.shape[:2]
    assert ids.array.shape[0] == 1
    assert SMALL_LENGTHS[0] <= ids.array.shape[1] <= SMALL_LENGTHS[1]
    assert np.all(mask.array == 1)
    assert np.all((ids.array >= 1) & (ids.array < 128))


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name != "BYTES"])
def test_every_datatype_survives_the_wire(datatype: str) -> None:
    tensors = drawn(InputSpec("x", datatype, (-1, 4)))
    body, length = encode_request(Message(tuple(tensors)))
    (back,) = decode_request(body, str(length), Limits()).tensors
    assert back.datatype == datatype
    assert np.array_equal(back.array, tensors[0].array)


def test_an_unknown_datatype_is_named() -> None:
    with pytest.raises(SpecError, match=r"'x'.*'BF16'"):
        drawn(InputSpec("x", "BF16", (1,)))


def test_inputs_are_read_from_metadata() -> None:
    document = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1, "dim", 3]}]}
    assert describe(document) == (InputSpec("text", "BYTES", (-1, -1, 3)),)


@pytest.mark.parametrize("document", [{}, {"inputs": []}, {"inputs": "text"}, {"inputs": [1]}, {"inputs": [{"name": "text"}]}])
def test_metadata_without_usable_inputs_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="metadata"):
        describe(document)
