"""Made-up tasks of every usual size for any stage, so that a profile sees how its service time varies from task to task.

Lengths of symbolic axes are drawn from a Gamma distribution about the model's typical ones; texts, pictures, sound and messages
are as long as that, too. Values are what dense arithmetic does not care about: ones.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping

import numpy as np
import orjson

from models.manifest import BATCH_AXIS, StageSpec, TensorSpec
from services.dataplane.wire import DTYPES, Array

SHAPE = 2.0
"""Of the Gamma distribution of lengths over their mean: cv² = 1/2, as texts that people send have about."""
_WORD, _MOST_TOKENS = "the ", 5
"""A word that is one token for most vocabularies, and the most that it is for any."""
_PICTURE_SIDES = (160, 1280)
"""Smallest and largest side [pixels] of a picture."""
_RATE_HZ = 16_000
_COUNT = "output_count"
"""Of a stage that reads generated tokens: how many of them count."""


def task(spec: StageSpec, axes: Mapping[str, int]) -> dict[str, Array]:
    """Inputs of one task whose symbolic axes have these lengths, without those that have a default."""
    made = {tensor.name: filled(tensor, axes) for tensor in spec.inputs if tensor.default is None}
    if _COUNT in made:
        made[_COUNT] *= axes.get("new", 1)
    return made


def varied(spec: StageSpec, typical_length: Mapping[str, int], rng: np.random.Generator) -> dict[str, Array]:
    """Inputs of one task of one item, of a size drawn at random."""
    longest = int(spec.parameters.get("max_tokens", 1 << 30))
    factor = rng.gamma(SHAPE, 1 / SHAPE)
    axes = {axis: max(1, min(longest, round(factor * typical))) for axis, typical in typical_length.items()}
    words = max(1, min(longest // _MOST_TOKENS, round(factor * typical_length.get("seq", 16))))
    made = task(spec, {**axes, BATCH_AXIS: 1})
    for tensor in spec.inputs:
        if tensor.datatype == "BYTES" and tensor.name in _MAKERS:
            made[tensor.name] = np.array([_MAKERS[tensor.name](words, rng)], dtype=object)
    return made


def filled(tensor: TensorSpec, axes: Mapping[str, int]) -> Array:
    """A made-up tensor whose symbolic axes have these lengths, or 1."""
    shape = tuple(axes.get(axis, 1) if isinstance(axis, str) else axis for axis in tensor.shape)
    if tensor.datatype == "BYTES":
        return np.full(shape, b"made up", dtype=object)
    # Ones, not zeros: a mask of zeros would let a stage skip its work.
    return np.ones(shape, DTYPES[tensor.datatype])


def _text(words: int, rng: np.random.Generator) -> bytes:
    del rng
    return (_WORD * words).encode()


def _messages(words: int, rng: np.random.Generator) -> bytes:
    """A question, every other time after an earlier question and its answer."""
    text = _WORD * words
    earlier = [{"role": "user", "content": text}, {"role": "assistant", "content": text}] if rng.random() < 0.5 else []
    return orjson.dumps([*earlier, {"role": "user", "content": text}])


def _picture(words: int, rng: np.random.Generator) -> bytes:
    """A smooth JPEG: one of noise would take longer to decode than any photo."""
    from PIL import Image  # noqa: PLC0415  only where a stage of pictures is measured, which needs it anyway

    del words
    width, height = (int(side) for side in rng.integers(*_PICTURE_SIDES, size=2))
    coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def _sound(words: int, rng: np.random.Generator) -> bytes:
    """A WAV of noise, at most a second long, which any window holds."""
    del words
    samples = int(rng.integers(1, _RATE_HZ))
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(_RATE_HZ)
        out.writeframes(rng.integers(-8000, 8000, samples, np.int16).tobytes())
    return file.getvalue()


_MAKERS: Mapping[str, Callable[[int, np.random.Generator], bytes]] = {
    "text": _text,
    "messages": _messages,
    "image": _picture,
    "audio": _sound,
}
"""Input -> what makes a value of it, of about so many words where it is text."""
