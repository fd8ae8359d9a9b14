from __future__ import annotations

import io
import json
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from loadgen import media
from loadgen.corpus import LONGEST, RANGES, SHORT_WORDS, SHORTEST, SMALL_LENGTHS, InputSpec, describe, payload, text
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


@pytest.mark.parametrize("name", ["query", "prompt"])
def test_a_query_and_a_prompt_are_short(name: str) -> None:
    words = {len(drawn(InputSpec(name, "BYTES", (-1,)), seed=seed)[0].array[0].split()) for seed in range(200)}
    assert (min(words), max(words)) == SHORT_WORDS


def test_an_image_is_one_that_can_be_opened() -> None:
    (tensor,) = drawn(InputSpec("image", "BYTES", (-1,)))
    with Image.open(io.BytesIO(tensor.array[0])) as image:
        assert (image.format, image.size in media.SIZES) == ("JPEG", True)


def test_audio_is_sound_that_can_be_read() -> None:
    (tensor,) = drawn(InputSpec("audio", "BYTES", (-1,)))
    with wave.open(io.BytesIO(tensor.array[0])) as file:
        assert file.getframerate() in media.RATES_HZ


def test_messages_are_a_question() -> None:
    (tensor,) = drawn(InputSpec("messages", "BYTES", (-1,)))
    (message,) = json.loads(tensor.array[0])
    assert message["role"] == "user"
    assert SHORT_WORDS[0] <= len(message["content"].split()) <= SHORT_WORDS[1]


def test_messages_beside_an_image_say_where_it_is_meant() -> None:
    image, messages = drawn(InputSpec("image", "BYTES", (-1,)), InputSpec("messages", "BYTES", (-1,)))
    assert image.array[0].startswith(b"\xff\xd8")
    (message,) = json.loads(messages.array[0])
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"]


def test_a_fixed_shape_is_filled_with_the_same_kind() -> None:
    (tensor,) = drawn(InputSpec("image", "BYTES", (3,)))
    assert len({element[:2] for element in tensor.array}) == 1
    assert len(set(tensor.array)) == 3


@pytest.mark.parametrize(
    ("name", "datatype"),
    [("max_tokens", "INT64"), ("seed", "INT64"), ("temperature", "FP32"), ("top_p", "FP32"), ("temperature", "FP64")],
)
def test_numbers_that_mean_something_stay_in_their_range(name: str, datatype: str) -> None:
    least, most = RANGES[name]
    values = [float(drawn(InputSpec(name, datatype, (-1,)), seed=seed)[0].array[0]) for seed in range(200)]
    assert least <= min(values) < max(values) <= most
    assert len(set(values)) > 10


def test_of_optional_inputs_only_the_length_of_the_answer_is_sent() -> None:
    optional = [InputSpec(name, "INT64", (-1,), optional=True) for name in ("max_tokens", "seed", "top_k")]
    assert [tensor.name for tensor in drawn(InputSpec("prompt", "BYTES", (-1,)), *optional)] == ["prompt", "max_tokens"]


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


def test_an_input_may_be_optional() -> None:
    entry = {"name": "seed", "datatype": "INT64", "shape": [-1]}
    document = {"inputs": [entry, entry | {"optional": True, "default": 0}, entry | {"optional": "yes"}]}
    assert [spec.optional for spec in describe(document)] == [False, True, False]


@pytest.mark.parametrize("document", [{}, {"inputs": []}, {"inputs": "text"}, {"inputs": [1]}, {"inputs": [{"name": "text"}]}])
def test_metadata_without_usable_inputs_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="metadata"):
        describe(document)
