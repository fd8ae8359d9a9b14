"""Compares a text classifier's stages with the whole model: tokens, logits, and the label that comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.directory import Report
from models.manifest import Manifest, Precision
from models.verification.chain import Core, Tokenise, weights
from models.verification.figures import Figure, apart, counted, worst
from models.verification.sentence import check_width
from models.verification.texts import batches

if TYPE_CHECKING:
    from models.session import Array

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}


def compare(
    manifest: Manifest, directory: Path, checkpoint: Checkpoint, rng: np.random.Generator, report: Report
) -> list[Figure]:
    """See `models.verification.Compare`."""
    chains = {precision: _Chain(manifest, directory, precision) for precision in manifest.parts("encode")[-1].files}
    report(f"loading {checkpoint.source}")
    model, tokenizer = load_model(checkpoint, "AutoModelForSequenceClassification"), load_tokenizer(checkpoint)
    check_width(checkpoint, manifest, int(model.config.hidden_size))
    texts = batches(tokenizer, int(manifest.stage("tokenise").parameters["max_tokens"]), rng)
    report(f"asking the whole model about {len(texts)} batches")
    expected = [_whole(model, tokenizer, batch) for batch in texts]
    figures: list[Figure] = []
    for precision, chain in chains.items():
        report(f"asking the stages, {precision}")
        figures += _compare(chain, precision, manifest.tolerances[precision], texts, expected)
    return figures


def _compare(
    chain: _Chain,
    precision: Precision,
    tolerance: float,
    texts: Sequence[Sequence[str]],
    expected: Sequence[tuple[Array, Array, Array]],
) -> list[Figure]:
    differ, logits = [], []
    for batch, (ids, mask, want) in zip(texts, expected, strict=True):
        own_ids, own_mask = chain.tokenise(batch)
        differ.append(not (np.array_equal(own_ids, ids) and np.array_equal(own_mask, mask)))
        # The encoder is asked about the reference's tokens, so that a tokenizer's fault does not show as its own.
        logits += list(apart(chain.logits(ids, mask), want))
    return [
        counted(precision, "batches whose tokens differ", differ),
        worst(precision, "logits, largest difference", logits, tolerance),
    ]


def _whole(model: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[Array, Array, Array]:
    """Ids, mask, int64 [batch, seq], and logits, float32 [batch, classes], of the checkpoint as its user would run it."""
    import torch  # noqa: PLC0415

    encoded: Any = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return ids.numpy(), mask.numpy(), logits.numpy()


class _Chain:
    """The exported stages, run one after the other in this process."""

    def __init__(self, manifest: Manifest, directory: Path, precision: Precision) -> None:
        self.tokenise = Tokenise(manifest, directory)
        self._encode = Core(manifest, directory, "encode", precision)
        label = manifest.stage("label")
        self._activation = _ACTIVATIONS[label.parameters["activation"]]
        self._head = weights(label, directory)

    def logits(self, ids: Array, mask: Array) -> Array:
        """Float32 [batch, classes]."""
        first = self._encode(input_ids=ids, attention_mask=mask)["last_hidden_state"][:, 0]
        inner = self._activation(first @ self._head["w1"] + self._head["b1"])
        found: Array = inner @ self._head["w2"] + self._head["b2"]
        return found
