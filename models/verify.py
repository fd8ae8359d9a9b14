"""Proves that an export's chained stages equal the whole PyTorch model, on texts that are meant to find a difference.

The reference is what a user of the checkpoint would run: its own tokenizer, the whole model as `from_pretrained` gives it, the
checkpoint's pooling, in torch. The chain is what a replica would run: the exported files with the manifest's parameters. This
module repeats the few lines of tokenising and pooling in numpy, because the light processors live in `services`, a floor up;
`tests/services` holds those to the same vectors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import sentence
from models.checkpoint import load_model, load_tokenizer, resolve
from models.directory import Report
from models.errors import CheckpointError
from models.manifest import Manifest, Precision, check_files, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from models.session import Array

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


@dataclass(frozen=True)
class Figure:
    """One comparison and its verdict."""

    precision: Precision
    what: str
    value: float
    """The worst over all texts, or the count."""
    mean: float
    """The mean over all texts."""
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the worst is within the tolerance; NaN is not."""
        return self.value <= self.tolerance


@dataclass(frozen=True)
class Verdict:
    """What verifying came to."""

    manifest: Manifest
    reference: str
    """Source of the checkpoint compared with."""
    texts: int
    batches: int
    figures: tuple[Figure, ...]

    @property
    def ok(self) -> bool:
        """Whether every figure is within its tolerance."""
        return all(figure.ok for figure in self.figures)


@dataclass(frozen=True)
class _Answer:
    """What a batch of texts gives."""

    ids: Array  # int64 [batch, seq]
    mask: Array  # int64 [batch, seq]
    hidden: Array  # float32 [batch, seq, hidden]
    embedding: Array  # float32 [batch, hidden]


def verify(directory: Path, source: str, seed: int = 0, report: Report = lambda _: None) -> Verdict:
    """Compare an export with the model it was made from, in every precision it holds.

    Args:
        directory: Of the export.
        source: The checkpoint, as `checkpoint.resolve` takes it.
        seed: Of the random texts.
        report: Told what is being done.

    Raises:
        ManifestError: no export there, or a file differs from its sha256.
        CheckpointError: the checkpoint cannot be read, or its hidden states have another width than the export's.
        StageBroken: ONNX Runtime cannot open or run a file.
    """
    manifest = load(directory)
    encode = manifest.stage("encode")
    chains = {precision: _Chain(manifest, directory, precision) for precision in encode.files}
    checkpoint = resolve(source)
    report(f"loading {checkpoint.source}")
    whole = _Whole(load_model(checkpoint), load_tokenizer(checkpoint), sentence.read(checkpoint))
    if whole.width != encode.outputs[0].shape[-1]:
        raise CheckpointError(
            f"{checkpoint.source} has hidden states of width {whole.width}, the export of {manifest.source} has "
            f"{encode.outputs[0].shape[-1]}: name the checkpoint that was exported"
        )
    texts = batches(whole.tokenizer, int(manifest.stage("tokenise").parameters["max_tokens"]), random.Random(seed))
    report(f"asking the whole model about {len(texts)} batches")
    expected = [whole.answer(batch) for batch in texts]
    figures: list[Figure] = []
    for precision, chain in chains.items():
        report(f"asking the stages, {precision}")
        figures += _compare(chain, precision, manifest.tolerances[precision], texts, expected)
    return Verdict(manifest, checkpoint.source, sum(map(len, texts)), len(texts), tuple(figures))


def batches(tokenizer: PreTrainedTokenizerFast, max_tokens: int, rng: random.Random) -> list[list[str]]:
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


def _words(words: Sequence[str], tokenizer: PreTrainedTokenizerFast, tokens: int, rng: random.Random) -> str:
    """A random text of at most that many tokens, special ones included."""
    text: list[str] = []
    while len(tokenizer(" ".join([*text, word := rng.choice(words)]))["input_ids"]) <= tokens:
        text.append(word)
    return " ".join(text)


def _compare(
    chain: _Chain, precision: Precision, tolerance: float, texts: Sequence[Sequence[str]], expected: Sequence[_Answer]
) -> list[Figure]:
    tokens, hidden, embedding = [], [], []
    for batch, want in zip(texts, expected, strict=True):
        ids, mask = chain.tokenise(batch)
        same = np.array_equal(ids, want.ids) and np.array_equal(mask, want.mask)
        tokens.append(float(not same))
        # The encoder is asked about the reference's tokens, so that a tokenizer's fault does not show as its own.
        states = chain.encode(want.ids, want.mask)
        hidden += list(np.where(want.mask == 1, np.abs(states - want.hidden).max(axis=2), 0).max(axis=1))
        if ids.shape[1] > chain.max_tokens:  # a tokenizer gone astray; the encoder has no room for it
            embedding += [math.inf] * len(batch)
            continue
        got = chain.pool(states if same else chain.encode(ids, mask), mask)
        embedding += list(_apart(got, want.embedding) if precision == "float32" else _angle(got, want.embedding))
    counted = Figure(precision, "batches whose tokens differ", float(np.sum(tokens)), float(np.mean(tokens)), 0.0)
    if precision == "int8":  # of its hidden states nothing is promised: the embedding is what it answers with
        return [counted, _figure(precision, "embedding, 1 - cosine", embedding, tolerance)]
    return [
        counted,
        _figure(precision, "embedding, largest difference", embedding, tolerance),
        _figure(precision, "hidden states, largest difference", hidden, tolerance),
    ]


def _figure(precision: Precision, what: str, values: Sequence[float], tolerance: float) -> Figure:
    return Figure(precision, what, float(np.max(values)), float(np.mean(values)), tolerance)


def _apart(a: Array, b: Array) -> Array:
    """Largest absolute difference of each row with its counterpart; shapes (batch, hidden), result (batch,)."""
    result: Array = np.abs(a - b).max(axis=1)
    return result


def _angle(a: Array, b: Array) -> Array:
    """1 - cosine of each row with its counterpart; shapes (batch, hidden), result (batch,)."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: Array = 1.0 - (a * b).sum(axis=1) / norms
    return result


class _Chain:
    """The exported stages, run one after the other in this process."""

    def __init__(self, manifest: Manifest, directory: Path, precision: Precision) -> None:
        from tokenizers import Tokenizer  # noqa: PLC0415

        from models.session import Session  # noqa: PLC0415

        tokenise = manifest.stage("tokenise")
        self._tokenizer = Tokenizer.from_file(str(check_files(tokenise, "float32", directory)[0]))
        self._tokenizer.enable_padding(pad_id=int(tokenise.parameters["pad_id"]))
        self._session = Session(check_files(manifest.stage("encode"), precision, directory)[0])
        self.max_tokens = int(tokenise.parameters["max_tokens"])
        self._pooling = manifest.stage("pool").parameters

    def tokenise(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Token ids and mask, int64 [batch, seq], of texts padded to the longest."""
        found = self._tokenizer.encode_batch(list(texts))
        ids = np.array([encoding.ids for encoding in found], np.int64)
        return ids, np.array([encoding.attention_mask for encoding in found], np.int64)

    def encode(self, ids: Array, mask: Array) -> Array:
        """Hidden states, float32 [batch, seq, hidden]."""
        return self._session.run({"input_ids": ids, "attention_mask": mask})[0]

    def pool(self, hidden: Array, mask: Array) -> Array:
        """Embeddings, float32 [batch, hidden]."""
        weight = mask[:, :, None].astype(np.float32)
        pooled = hidden[:, 0] if self._pooling["mode"] == "cls" else (hidden * weight).sum(axis=1) / weight.sum(axis=1)
        if not self._pooling["normalise"]:
            return pooled
        normalised: Array = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
        return normalised


class _Whole:
    """The checkpoint as its user would run it, in PyTorch."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerFast, settings: sentence.SentenceSettings) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._settings = settings

    @property
    def width(self) -> int:
        """Length of a hidden state."""
        return int(self._model.config.hidden_size)

    def answer(self, texts: Sequence[str]) -> _Answer:
        """What the whole model makes of a batch."""
        import torch  # noqa: PLC0415

        encoded: Any = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            hidden = self._model(**encoded).last_hidden_state
            mask = encoded["attention_mask"]
            if self._settings.mode == "cls":
                pooled = hidden[:, 0]
            else:
                pooled = torch.stack([row[keep == 1].mean(dim=0) for row, keep in zip(hidden, mask, strict=True)])
            if self._settings.normalise:
                pooled = torch.nn.functional.normalize(pooled, dim=1)
        return _Answer(encoded["input_ids"].numpy(), mask.numpy(), hidden.numpy(), pooled.numpy())
