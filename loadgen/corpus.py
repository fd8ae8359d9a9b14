"""What tasks carry: payloads for whatever inputs a model declares, drawn from a small English-like corpus of our own.

Never one payload: a server that caches, or that is only ever warm for one length, would measure too well. Texts have between 3
and 150 words, log-normal around 20, most between 10 and 40, since the time of an encoder grows with length and mixed lengths
are what makes batches uneven. Everything is drawn from the generator handed in; the words are made up here, by a grammar of
one page, and belong to no data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadgen.errors import SpecError
from services.dataplane.wire import DTYPES, Array, Tensor

MEDIAN_WORDS, SPREAD = 20.0, 0.65
"""Median of a text's words, and the standard deviation of their logarithm."""
SHORTEST, LONGEST = 3, 150

SMALL_LENGTHS = (4, 16)
"""Least and greatest length drawn for a symbolic axis of a numeric input."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model, as its metadata declares it; -1 in the shape stands for a length that may vary."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def payload(inputs: Sequence[InputSpec], rng: np.random.Generator) -> tuple[Tensor, ...]:
    """One task's tensors for these inputs.

    A BYTES input takes texts, as many as its name suggests: `labels` 2 to 6 short topics, `documents` 3 to 8 texts, `query`
    one short text, any other one text. Along a shape, that number fills the first variable axis; further ones are 1.
    A numeric input takes random values; its first variable axis is 1 (one item), and each further one has one length between
    SMALL_LENGTHS that all inputs of the task share, so that ids and their mask agree.

    Raises:
        SpecError: an input of a datatype that the wire does not know.
    """
    axes = max(len(spec.shape) for spec in inputs)
    lengths = [1, *(int(n) for n in rng.integers(SMALL_LENGTHS[0], SMALL_LENGTHS[1] + 1, size=axes))]
    return tuple(Tensor(spec.name, spec.datatype, _array(spec, lengths, rng)) for spec in inputs)


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
    return InputSpec(name, datatype, tuple(n if isinstance(n, int) and n >= 0 else -1 for n in shape))


# --- tensors --------------------------------------------------------------------------------------------------------------


def _array(spec: InputSpec, lengths: Sequence[int], rng: np.random.Generator) -> Array:
    if spec.datatype == "BYTES":
        return _texts(spec, rng)
    if spec.datatype not in DTYPES:
        raise SpecError(f"input {spec.name!r} has the datatype {spec.datatype!r}; this generator can send {', '.join(DTYPES)}")
    shape = tuple(lengths[axis] if length < 0 else length for axis, length in enumerate(spec.shape))
    return _numbers(spec, shape, rng).astype(DTYPES[spec.datatype])


def _texts(spec: InputSpec, rng: np.random.Generator) -> Array:
    several = _SEVERAL.get(spec.name, _one_text)(rng)
    variable = spec.shape.index(-1) if -1 in spec.shape else None
    shape = tuple(length if length >= 0 else len(several) if axis == variable else 1 for axis, length in enumerate(spec.shape))
    count = math.prod(shape)
    # A fixed shape may ask for fewer or more than the name suggests.
    several = [*several[:count], *(text(rng) for _ in range(count - len(several)))]
    array = np.empty(count, dtype=object)
    array[:] = [each.encode() for each in several]
    return array.reshape(shape)


def _numbers(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if "mask" in spec.name:
        return np.ones(shape)  # a mask of anything else would hide all items of a short task
    if spec.datatype.startswith("FP"):
        return rng.standard_normal(shape)
    if spec.datatype == "BOOL":
        return rng.random(shape) < 0.5
    # 1..127 fits every integer type and is a valid token id of any vocabulary.
    return rng.integers(1, 128, size=shape)


def _one_text(rng: np.random.Generator) -> list[str]:
    return [text(rng)]


def _query(rng: np.random.Generator) -> list[str]:
    return [_prose(int(rng.integers(SHORTEST, 13)), rng)]


def _labels(rng: np.random.Generator) -> list[str]:
    topics = rng.choice(len(_NOUNS), size=int(rng.integers(2, 7)), replace=False)
    return [f"{_FRAMES[int(rng.integers(len(_FRAMES)))]}{_NOUNS[topic]}" for topic in topics]


def _documents(rng: np.random.Generator) -> list[str]:
    return [text(rng) for _ in range(int(rng.integers(3, 9)))]


_SEVERAL: Mapping[str, Callable[[np.random.Generator], list[str]]] = {
    "labels": _labels,
    "query": _query,
    "documents": _documents,
}


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
