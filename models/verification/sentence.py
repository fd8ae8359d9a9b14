"""Compares a sentence encoder's stages with the whole model: tokens, hidden states and pooled embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import sentence
from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.directory import Report
from models.manifest import Manifest, Precision
from models.verification.chain import Core, Tokenise, refuse_other_width
from models.verification.figures import Figure, apart_at, counted, measure, worst
from models.verification.texts import batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from models.session import Array


@dataclass(frozen=True)
class _Answer:
    """What a batch of texts gives."""

    ids: Array  # int64 [batch, seq]
    mask: Array  # int64 [batch, seq]
    hidden: Array  # float32 [batch, seq, hidden]
    embedding: Array  # float32 [batch, hidden]


def compare(
    manifest: Manifest, directory: Path, checkpoint: Checkpoint, rng: np.random.Generator, report: Report
) -> list[Figure]:
    """See `models.verification.Compare`."""
    encode = manifest.parts("encode")[-1]
    chains = {precision: _Chain(manifest, directory, precision) for precision in encode.files}
    report(f"loading {checkpoint.source}")
    whole = _Whole(load_model(checkpoint), load_tokenizer(checkpoint), sentence.read(checkpoint))
    check_width(checkpoint, manifest, whole.width)
    texts = batches(whole.tokenizer, int(manifest.stage("tokenise").parameters["max_tokens"]), rng)
    report(f"asking the whole model about {len(texts)} batches")
    expected = [whole.answer(batch) for batch in texts]
    figures: list[Figure] = []
    for precision, chain in chains.items():
        report(f"asking the stages, {precision}")
        figures += _compare(chain, precision, manifest.tolerances[precision], texts, expected)
    return figures


def check_width(checkpoint: Checkpoint, manifest: Manifest, width: int) -> None:
    """Raise CheckpointError where the checkpoint's hidden states are not as wide as the export's."""
    refuse_other_width(checkpoint, manifest, width, manifest.parts("encode")[-1].outputs[0].shape[-1])


def _compare(
    chain: _Chain, precision: Precision, tolerance: float, texts: Sequence[Sequence[str]], expected: Sequence[_Answer]
) -> list[Figure]:
    distance, called = measure(precision)
    differ, hidden, embedding = [], [], []
    for batch, want in zip(texts, expected, strict=True):
        ids, mask = chain.tokenise(batch)
        same = np.array_equal(ids, want.ids) and np.array_equal(mask, want.mask)
        differ.append(not same)
        # The encoder is asked about the reference's tokens, so that a tokenizer's fault does not show as its own.
        states = chain.encode(want.ids, want.mask)
        hidden += list(apart_at(want.mask, states, want.hidden))
        if ids.shape[1] > chain.tokenise.max_tokens:  # a tokenizer gone astray; the encoder has no room for it
            embedding += [math.inf] * len(batch)
            continue
        got = chain.pool(states if same else chain.encode(ids, mask), mask)
        embedding += list(distance(got, want.embedding))
    figures = [
        counted(precision, "batches whose tokens differ", differ),
        worst(precision, f"embedding, {called}", embedding, tolerance),
    ]
    if precision == "float32":  # of a coarser one's hidden states nothing is promised: the embedding is what it answers with
        figures.append(worst(precision, "hidden states, largest difference", hidden, tolerance))
    return figures


class _Chain:
    """The exported stages, run one after the other in this process."""

    def __init__(self, manifest: Manifest, directory: Path, precision: Precision) -> None:
        self.tokenise = Tokenise(manifest, directory)
        self._encode = Core(manifest, directory, "encode", precision)
        self._pooling = manifest.stage("pool").parameters

    def encode(self, ids: Array, mask: Array) -> Array:
        """Hidden states, float32 [batch, seq, hidden]."""
        return self._encode(input_ids=ids, attention_mask=mask)["last_hidden_state"]

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
