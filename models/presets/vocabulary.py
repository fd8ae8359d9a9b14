"""A byte-level BPE tokenizer trained on text that is made here: no corpus, any text can be encoded, and the same every time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SENTENCE_WORDS = (4, 16)
"""Fewest and most words of a sentence."""
COMMON = """
the of and to in a is that it was for on are as with his they at be this have from or one had by word but not what all were
we when your can said there use an each which she do how their if will up other about out many then them these so some her
would make like him into time has look two more write go see number no way could people my than first water been call who oil
its now find long down day did get come made may part photo image picture cat dog bird tree house car person child old new
red green blue black white big small good bad great service task queue stage light core edge node model deadline late early
speech text describe question answer user assistant system
"""
"""Everyday words, so that everyday text is not spelt letter by letter."""


def text(seed: int, sentences: int) -> Iterator[str]:
    """Sentences of everyday and of made-up words, whose frequencies fall off as those of a language do (Zipf)."""
    rng = np.random.default_rng(seed)
    words = [*COMMON.split(), *_made_up(rng, 4000)]
    shares = 1.0 / np.arange(2, len(words) + 2)
    for _ in range(sentences):
        count = int(rng.integers(*SENTENCE_WORDS))
        chosen = [words[i] for i in rng.choice(len(words), count, p=shares / shares.sum())]
        yield " ".join([chosen[0].capitalize(), *chosen[1:]]) + str(rng.choice([".", "?", "!", ", 42."]))


def train(size: int, special: Sequence[str], seed: int = 0) -> Any:
    """A `tokenizers.Tokenizer` of at most `size` entries; the special ones come first, in their order, then the 256 bytes."""
    import tokenizers as t  # noqa: PLC0415

    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = t.decoders.ByteLevel()
    trainer = t.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(seed, 8 * size), trainer)
    return tokenizer


def save(tokenizer: Any, directory: Path, special: Mapping[str, str], **further: Any) -> None:
    """Write it as transformers does; `special` names the tokens (`pad_token` and so on), `further` is of its configuration."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **further)  # type: ignore[no-untyped-call]
    fast.save_pretrained(directory)


def write_json(path: Path, document: Any) -> None:
    """A configuration file."""
    path.write_text(json.dumps(document, indent=2) + "\n")


def _made_up(rng: np.random.Generator, count: int) -> list[str]:
    """Words that can be pronounced."""
    starts = [
        "",
        *"bcdfghklmnprstvw",
        "br",
        "ch",
        "cl",
        "dr",
        "fl",
        "gr",
        "pl",
        "pr",
        "qu",
        "sh",
        "sp",
        "st",
        "str",
        "th",
        "tr",
    ]
    middles = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "ie", "oo", "ou"]
    ends = ["", "", "", "ck", "d", "l", "ll", "m", "n", "nd", "ng", "nt", "r", "rd", "s", "ss", "st", "t", "x"]
    tails = ["", "", "ed", "er", "ing", "ly", "s", "tion"]

    def word() -> str:
        syllables = ["".join(str(rng.choice(part)) for part in (starts, middles, ends)) for _ in range(int(rng.integers(1, 4)))]
        return "".join(syllables) + str(rng.choice(tails))

    return [word() for _ in range(count)]
