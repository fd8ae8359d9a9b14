"""Images and sound: files that any library opens, of many sizes, never twice the same, and the same again for the same seed."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loadgen import media


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_every_image_is_a_whole_one_with_something_to_see(seed: int) -> None:
    with Image.open(io.BytesIO(media.image(np.random.default_rng(seed)))) as image:
        assert image.format == "JPEG"
        assert image.size in media.SIZES
        pixels = np.asarray(image.convert("L"), np.float64)
    assert pixels.std() > 3


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_every_sound_lasts_as_long_as_it_should_and_is_heard(seed: int) -> None:
    with wave.open(io.BytesIO(media.sound(np.random.default_rng(seed)))) as file:
        assert file.getsampwidth() == 2
        assert file.getnchannels() in (1, 2)
        assert media.SHORTEST_S - 0.001 <= file.getnframes() / file.getframerate() <= media.LONGEST_S + 0.001
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert 0.05 * 32_767 < np.abs(samples.astype(int)).max() <= 32_767
    assert abs(float(samples.mean())) < 0.2 * np.abs(samples.astype(int)).max()


def test_sizes_rates_and_channels_are_mixed() -> None:
    rng = np.random.default_rng(1)
    sizes = {Image.open(io.BytesIO(media.image(rng))).size for _ in range(40)}
    assert sizes == set(media.SIZES)
    kinds = set()
    for _ in range(60):
        with wave.open(io.BytesIO(media.sound(rng))) as file:
            kinds.add((file.getframerate(), file.getnchannels()))
    assert {rate for rate, _ in kinds} == set(media.RATES_HZ)
    assert {channels for _, channels in kinds} == {1, 2}


@pytest.mark.parametrize("make", [media.image, media.sound])
def test_nothing_repeats_and_the_seed_is_followed(make: object) -> None:
    assert callable(make)
    first, again, other = ([make(rng) for _ in range(10)] for rng in map(np.random.default_rng, (1, 1, 2)))
    assert first == again
    assert len(set(first) | set(other)) == 20
