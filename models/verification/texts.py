"""Texts to compare on: odd ones, random ones of every length, the longest that fits; alone and in batches that pad most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ODD_TEXTS = (
    "",
    " ",
    "a",
    "?!...",
    "🦆🪿 geese 👩‍👩‍👧‍👦",
    "مرحبا بالعالم",
    "שלום עולם",
    "今日は世界",
    "naïve café ﬁancée e\u0301",
    "zero\u200bwidth\u00adsoft",
    "<b>markup</b> [CLS] [SEP] [MASK]",
    "line\nbreak\ttab\r\n",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
)


def batches(tokenizer: PreTrainedTokenizerFast, max_tokens: int, rng: np.random.Generator) -> list[list[str]]:
    """Texts to compare on: odd ones, random ones of all lengths, one of the longest; alone and in batches that pad most.

    Words are drawn from the tokenizer's vocabulary, so a tiny checkpoint is asked as much as a large one.
    """
    words = sorted(word for word in tokenizer.get_vocab() if word.isalnum()) or ["a"]
    odd = [text for text in ODD_TEXTS if len(tokenizer(text)["input_ids"]) <= max_tokens]
    some = [_words(words, tokenizer, min(length, max_tokens), rng) for length in (3, 5, 9, 17, 33, 65, 129, 200)]
    longest = _words(words, tokenizer, max_tokens, rng)
    mixed = [*odd, *some]
    rng.shuffle(mixed)
    return [*([text] for text in (*odd, *some, longest)), mixed, [odd[0], longest], some[::-1]]


def _words(words: Sequence[str], tokenizer: PreTrainedTokenizerFast, tokens: int, rng: np.random.Generator) -> str:
    """A random text of at most that many tokens, special ones included."""
    text: list[str] = []
    while len(tokenizer(" ".join([*text, word := words[int(rng.integers(len(words)))]]))["input_ids"]) <= tokens:
        text.append(word)
    return " ".join(text)
