"""What tasks carry: payloads for whatever inputs a model declares, drawn from a small English-like corpus of our own.

Never one payload: a server that caches, or that is only ever warm for one length, would measure too well. Texts have between 3
and 150 words, log-normal around 20, most between 10 and 40, since the time of an encoder grows with length and mixed lengths
are what makes batches uneven. Everything is drawn from the generator handed in; the words are made up here, by a grammar of
one page, images and sound by `loadgen.media`, and belong to no data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from loadgen import media
from loadgen.errors import SpecError
from services.dataplane.wire import DTYPES, Array, Tensor

MEDIAN_WORDS, SPREAD = 20.0, 0.65
"""Median of a text's words, and the standard deviation of their logarithm."""
SHORTEST, LONGEST = 3, 150

SHORT_WORDS = (3, 12)
"""Least and greatest number of words of a query, a prompt or a message: the smallest decoders have room for 96 tokens."""

SMALL_LENGTHS = (4, 16)
"""Least and greatest length drawn for a symbolic axis of a numeric input."""

IMAGE, MAX_TOKENS = "image", "max_tokens"
RANGES: Mapping[str, tuple[float, float]] = {
    MAX_TOKENS: (8, 24),
    "seed": (0, 2**31 - 1),
    "temperature": (0.0, 1.0),
    "top_p": (0.5, 1.0),
}
"""Least and greatest value of the numeric inputs whose values mean something, by name."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model, as its metadata declares it; -1 in the shape stands for a length that may vary."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False
    """Whether a task may leave it out."""


def payload(inputs: Sequence[InputSpec], rng: np.random.Generator) -> tuple[Tensor, ...]:
    """One task's tensors for these inputs.

    A BYTES input takes what its name suggests, and as many: `labels` 2 to 6 short topics, `documents` 3 to 8 texts, `query` and
    `prompt` one short text, `image` an image file, `audio` a sound file, `messages` a chat of one question, which is about an
    image where the task has an `image`; any other one text. Along a shape, that number fills the first variable axis; further
    ones are 1. A numeric input takes random values, within RANGES where its name is there; its first variable axis is 1 (one
    item), and each further one has one length between SMALL_LENGTHS that all inputs of the task share, so that ids and their
    mask agree. Of the inputs that may be left out only `max_tokens` is sent: a run would be all about the longest answers.

    Raises:
        SpecError: an input of a datatype that the wire does not know.
    """
    axes = max(len(spec.shape) for spec in inputs)
    lengths = [1, *(int(n) for n in rng.integers(SMALL_LENGTHS[0], SMALL_LENGTHS[1] + 1, size=axes))]
    sent = [spec for spec in inputs if not spec.optional or spec.name == MAX_TOKENS]
    names = {spec.name for spec in sent}
    return tuple(Tensor(spec.name, spec.datatype, _array(spec, names, lengths, rng)) for spec in sent)


def text(rng: np.random.Generator) -> str:
    """One text of mixed length; see the module."""
    words = math.exp(rng.normal(math.log(MEDIAN_WORDS), SPREAD))
    return _prose(int(min(max(round(words), SHORTEST), LONGEST)), rng)


def describe(document: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """The inputs that a model's metadata document declares.

    Raises:
        SpecError: it declares none, or one without name, datatype or shape.
    """
    entries = document.get("inputs")
    if not isinstance(entries, list) or not entries:
        raise SpecError("its metadata lists no inputs, so no payload can be made for it")
    return tuple(_input(entry) for entry in entries)


def _input(entry: Any) -> InputSpec:
    name, datatype, shape = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "datatype", "shape"))
    if not isinstance(name, str) or not isinstance(datatype, str) or not isinstance(shape, list):
        raise SpecError("its metadata has an input without name, datatype or shape")
    # Servers write lengths as numbers or, some, as text; anything else varies.
    lengths = tuple(n if isinstance(n, int) and n >= 0 else -1 for n in shape)
    return InputSpec(name, datatype, lengths, entry.get("optional") is True)


# --- tensors --------------------------------------------------------------------------------------------------------------


def _array(spec: InputSpec, names: Collection[str], lengths: Sequence[int], rng: np.random.Generator) -> Array:
    if spec.datatype == "BYTES":
        return _bytes(spec, names, rng)
    if spec.datatype not in DTYPES:
        raise SpecError(f"input {spec.name!r} has the datatype {spec.datatype!r}; this generator can send {', '.join(DTYPES)}")
    shape = tuple(lengths[axis] if length < 0 else length for axis, length in enumerate(spec.shape))
    return _numbers(spec, shape, rng).astype(DTYPES[spec.datatype])


def _bytes(spec: InputSpec, names: Collection[str], rng: np.random.Generator) -> Array:
    """Elements of a BYTES input of a task that has inputs of these names."""
    one = _ONE.get(spec.name, _text)
    several = _SEVERAL[spec.name](rng) if spec.name in _SEVERAL else [one(names, rng)]
    variable = spec.shape.index(-1) if -1 in spec.shape else None
    shape = tuple(length if length >= 0 else len(several) if axis == variable else 1 for axis, length in enumerate(spec.shape))
    count = math.prod(shape)
    # A fixed shape may ask for fewer or more than the name suggests.
    several = [*several[:count], *(one(names, rng) for _ in range(count - len(several)))]
    array = np.empty(count, dtype=object)
    array[:] = several
    return array.reshape(shape)


def _numbers(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if "mask" in spec.name:
        return np.ones(shape)  # a mask of anything else would hide all items of a short task
    if spec.name in RANGES:
        least, most = RANGES[spec.name]
        return (
            rng.uniform(least, most, shape)
            if spec.datatype.startswith("FP")
            else rng.integers(int(least), int(most) + 1, shape)
        )
    if spec.datatype.startswith("FP"):
        return rng.standard_normal(shape)
    if spec.datatype == "BOOL":
        return rng.random(shape) < 0.5
    # 1..127 fits every integer type and is a valid token id of any vocabulary.
    return rng.integers(1, 128, size=shape)


def _text(names: Collection[str], rng: np.random.Generator) -> bytes:
    del names
    return text(rng).encode()


def _short(names: Collection[str], rng: np.random.Generator) -> bytes:
    del names
    return _prose(int(rng.integers(SHORT_WORDS[0], SHORT_WORDS[1] + 1)), rng).encode()


def _image(names: Collection[str], rng: np.random.Generator) -> bytes:
    del names
    return media.image(rng)


def _audio(names: Collection[str], rng: np.random.Generator) -> bytes:
    del names
    return media.sound(rng)


def _messages(names: Collection[str], rng: np.random.Generator) -> bytes:
    asked = _short(names, rng).decode()
    # The image itself travels beside the messages; here is its place among the words.
    content = [{"type": "image"}, {"type": "text", "text": asked}] if IMAGE in names else asked
    return orjson.dumps([{"role": "user", "content": content}])


_ONE: Mapping[str, Callable[[Collection[str], np.random.Generator], bytes]] = {
    "query": _short,
    "prompt": _short,
    IMAGE: _image,
    "audio": _audio,
    "messages": _messages,
}
"""What makes one element of a BYTES input of that name, for a task that has inputs of these names."""


def _labels(rng: np.random.Generator) -> list[bytes]:
    topics = rng.choice(len(_NOUNS), size=int(rng.integers(2, 7)), replace=False)
    return [f"{_FRAMES[int(rng.integers(len(_FRAMES)))]}{_NOUNS[topic]}".encode() for topic in topics]


def _documents(rng: np.random.Generator) -> list[bytes]:
    return [text(rng).encode() for _ in range(int(rng.integers(3, 9)))]


_SEVERAL: Mapping[str, Callable[[np.random.Generator], list[bytes]]] = {"labels": _labels, "documents": _documents}


# --- the grammar ----------------------------------------------------------------------------------------------------------
#
#   sentence -> opener? subject verb object tail?          subject, object -> determiner adjective? noun
#   tail     -> preposition determiner noun | adverb | conjunction subject verb object


def _prose(words: int, rng: np.random.Generator) -> str:
    """Sentences of exactly `words` words in all; the last one may break off, as real input does."""
    # One draw for the whole text: a scalar draw costs more than the rest of a word. A sentence has at least 5 words and uses
    # at most 22 numbers.
    dice = iter(rng.random(22 * (words // 5 + 1)).tolist())
    text_words: list[str] = []
    while len(text_words) < words:
        sentence = list(_sentence(dice))
        sentence[0] = sentence[0].capitalize()
        sentence[-1] += "."
        text_words += sentence
    return " ".join(text_words[:words])


def _sentence(dice: Iterator[float]) -> Iterator[str]:
    if next(dice) < 0.25:
        yield _pick(_OPENERS, dice)
    yield from _clause(dice)
    tail = next(dice)
    if tail < 0.35:
        yield _pick(_PREPOSITIONS, dice)
        yield _pick(_DETERMINERS, dice)
        yield _pick(_NOUNS, dice)
    elif tail < 0.55:
        yield _pick(_ADVERBS, dice)
    elif tail < 0.75:
        yield _pick(_CONJUNCTIONS, dice)
        yield from _clause(dice)


def _clause(dice: Iterator[float]) -> Iterator[str]:
    yield from _thing(dice)
    yield _pick(_VERBS, dice)
    yield from _thing(dice)


def _thing(dice: Iterator[float]) -> Iterator[str]:
    yield _pick(_DETERMINERS, dice)
    if next(dice) < 0.4:
        yield _pick(_ADJECTIVES, dice)
    yield _pick(_NOUNS, dice)


def _pick(words: Sequence[str], dice: Iterator[float]) -> str:
    return words[int(next(dice) * len(words))]


def _words(words: str) -> tuple[str, ...]:
    return tuple(words.split())


_DETERMINERS = _words("the one this that every our another some no each")
_NOUNS = _words(
    "harbour engine garden ticket kitchen sensor river teacher orchard bridge parcel violin meadow router clinic bicycle "
    "lantern battery market letter glacier camera workshop invoice tram beehive library pump recipe antenna ferry carpenter "
    "greenhouse receipt turbine choir mountain printer bakery signal farmer passport tunnel nurse canal keyboard orchestra "
    "warehouse comet dentist ladder forecast elevator gallery thermostat pilot vineyard contract satellite cellar referee "
    "compass museum gearbox festival notebook"
)
_ADJECTIVES = _words(
    "quiet broken early northern careful narrow cheap frozen bright unpaid rusty gentle crowded spare hollow patient wooden "
    "late electric salty distant noisy fragile humble steep modern"
)
_VERBS = _words(
    "repairs carries follows paints delays opens measures borrows ignores cleans sells answers replaces lifts remembers "
    "signals warms inspects overtakes feeds cancels records joins protects describes needs"
)
_ADVERBS = _words("slowly again twice tomorrow carefully outside yesterday together almost nearby often quietly")
_PREPOSITIONS = _words("behind near under beside without after before across inside against")
_CONJUNCTIONS = _words("and but because while although until so when")
_OPENERS = _words("today sometimes later perhaps usually meanwhile somehow still")
_FRAMES = ("", "", "about the ", "trouble with a ", "news of the ", "buying a ")
