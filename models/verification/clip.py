"""Compares CLIP's stages with the whole model: states, both embeddings, and the scores of pictures against labels.

Pictures are made of pixel values as they leave the preprocessing, and beyond its range; that the stage `preprocess` makes the
same of a file as transformers does is shown where its processor lives, in `tests/services`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.directory import Report
from models.errors import CheckpointError
from models.manifest import Manifest, Precision, StageSpec
from models.verification.chain import Core, Tokenise, weights
from models.verification.figures import Figure, apart, apart_at, counted, measure, worst
from models.verification.texts import batches

if TYPE_CHECKING:
    from models.session import Array

LABELS = ("cat", "a photo of a dog", "", "ein Bild 🦆")
"""Texts that the pictures are scored against."""


@dataclass(frozen=True)
class _Seen:
    """What the whole model makes of a batch of pictures."""

    hidden: Array  # float32 [batch, tokens, width]
    embedding: Array  # float32 [batch, projection]
    scores: Array  # float32 [batch, labels]


@dataclass(frozen=True)
class _Read:
    """What it makes of a batch of texts."""

    ids: Array  # int64 [batch, seq]
    mask: Array  # int64 [batch, seq]
    hidden: Array  # float32 [batch, seq, width]
    embedding: Array  # float32 [batch, projection]


def compare(
    manifest: Manifest, directory: Path, checkpoint: Checkpoint, rng: np.random.Generator, report: Report
) -> list[Figure]:
    """See `models.verification.Compare`."""
    first = manifest.parts("vision")[0]
    chains = {precision: _Chain(manifest, directory, precision) for precision in first.files}
    report(f"loading {checkpoint.source}")
    whole = _Whole(load_model(checkpoint, "CLIPModel"), load_tokenizer(checkpoint))
    pictures = images([int(axis) for axis in first.inputs[0].shape[1:]], rng)
    if whole.image_shape != first.inputs[0].shape[1:] or whole.projection != manifest.stage("match").inputs[0].shape[1]:
        raise CheckpointError(f"{checkpoint.source} is of other dimensions than {manifest.source}: name what was exported")
    texts = batches(whole.tokenizer, int(manifest.stage("tokenise").parameters["max_tokens"]), rng)
    report(f"asking the whole model about {len(pictures) + len(texts)} batches")
    seen = [whole.see(batch) for batch in pictures]
    read = [whole.read(batch) for batch in texts]
    figures: list[Figure] = []
    for precision, chain in chains.items():
        report(f"asking the stages, {precision}")
        figures += _pictures(chain, precision, manifest.tolerances[precision], pictures, seen)
        figures += _texts(chain, precision, manifest.tolerances[precision], texts, read)
    return figures


def images(shape: Sequence[int], rng: np.random.Generator) -> list[Array]:
    """Batches of pixel values, float32 [batch, channels, height, width]: noise, flat, striped; some beyond the range."""
    noise = rng.normal(size=(6, *shape)).astype(np.float32)
    contrast = noise * np.array([1e-3, 0.1, 0.5, 1.0, 2.5, 10.0], np.float32).reshape(-1, 1, 1, 1)
    flat = np.zeros((3, *shape), np.float32) + np.array([-1.8, 0.0, 2.2], np.float32).reshape(-1, 1, 1, 1)
    stripes = np.where(np.arange(shape[-1]) % 4 < 2, -1.8, 2.2).astype(np.float32) * np.ones((1, *shape), np.float32)
    smooth = np.linspace(-1.8, 2.2, shape[-1], dtype=np.float32) * np.ones((1, *shape), np.float32)
    every = np.concatenate([contrast, flat, stripes, smooth])
    return [*(each[None] for each in every), every[: len(every) // 2], every[::-1][:5]]


def _pictures(
    chain: _Chain, precision: Precision, tolerance: float, pictures: Sequence[Array], seen: Sequence[_Seen]
) -> list[Figure]:
    labels = chain.text_head(*chain.states(LABELS))
    distance, called = measure(precision)
    hidden, embedding, scores = [], [], []
    for batch, want in zip(pictures, seen, strict=True):
        states = chain.vision(pixel_values=batch)["last_hidden_state"]
        got = chain.image_head(states)
        hidden += list(apart(states, want.hidden))
        embedding += list(distance(got, want.embedding))
        scores += list(apart(chain.match(got, labels), want.scores))
    figures = [worst(precision, f"image embedding, {called}", embedding, tolerance)]
    if precision == "float32":
        figures.append(worst(precision, "states of vision, largest difference", hidden, tolerance))
        figures.append(worst(precision, "scores of labels, largest difference", scores, tolerance))
    return figures


def _texts(
    chain: _Chain, precision: Precision, tolerance: float, texts: Sequence[Sequence[str]], read: Sequence[_Read]
) -> list[Figure]:
    distance, called = measure(precision)
    differ, hidden, embedding = [], [], []
    for batch, want in zip(texts, read, strict=True):
        ids, mask = chain.tokenise(batch)
        differ.append(not (np.array_equal(ids, want.ids) and np.array_equal(mask, want.mask)))
        # The encoder is asked about the reference's tokens, so that a tokenizer's fault does not show as its own.
        states = chain.text(input_ids=want.ids, attention_mask=want.mask)["last_hidden_state"]
        got = chain.text_head(states, want.ids)
        hidden += list(apart_at(want.mask, states, want.hidden))
        embedding += list(distance(got, want.embedding))
    figures = [
        counted(precision, "batches whose tokens differ", differ),
        worst(precision, f"text embedding, {called}", embedding, tolerance),
    ]
    if precision == "float32":
        figures.append(worst(precision, "states of text, largest difference", hidden, tolerance))
    return figures


class _Chain:
    """The exported stages, run one after the other in this process."""

    def __init__(self, manifest: Manifest, directory: Path, precision: Precision) -> None:
        self.tokenise = Tokenise(manifest, directory)
        self.vision = Core(manifest, directory, "vision", precision)
        self.text = Core(manifest, directory, "text", precision)
        self._heads = {name: _Head(manifest.stage(name), directory) for name in ("image_head", "text_head")}
        self._scale = float(manifest.stage("match").parameters["scale"])

    def states(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Hidden states and ids of a batch of texts."""
        ids, mask = self.tokenise(texts)
        return self.text(input_ids=ids, attention_mask=mask)["last_hidden_state"], ids

    def image_head(self, states: Array) -> Array:
        """Embeddings of pictures, float32 [batch, projection]."""
        return self._heads["image_head"](states[:, 0])

    def text_head(self, states: Array, ids: Array) -> Array:
        """Embeddings of texts, float32 [batch, projection]: of the first token that ends the text."""
        eos = self._heads["text_head"].eos
        place = ids.argmax(axis=1) if eos is None else (ids == eos).argmax(axis=1)
        return self._heads["text_head"](states[np.arange(len(ids)), place])

    def match(self, pictures: Array, labels: Array) -> Array:
        """Scores, float32 [batch, labels], that add up to 1."""
        logits = self._scale * pictures @ labels.T
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores: Array = powers / powers.sum(axis=1, keepdims=True)
        return scores


class _Head:
    """A `project` stage's arithmetic after the choice of a token: norm, projection, unit length."""

    def __init__(self, stage: StageSpec, directory: Path) -> None:
        self._arrays = weights(stage, directory)
        self._eps = float(stage.parameters.get("layer_norm_eps", 0.0))
        self._normalise = bool(stage.parameters["normalise"])
        self.eos = stage.parameters.get("eos_id")

    def __call__(self, chosen: Array) -> Array:
        if "ln_weight" in self._arrays:
            centred = chosen - chosen.mean(axis=1, keepdims=True)
            chosen = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + self._eps)
            chosen = chosen * self._arrays["ln_weight"] + self._arrays["ln_bias"]
        projected: Array = chosen @ self._arrays["w1"]
        return projected / np.linalg.norm(projected, axis=1, keepdims=True) if self._normalise else projected


class _Whole:
    """The checkpoint as its user would run it, in PyTorch."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._labels = self._tokens(LABELS)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of a picture."""
        config = self._model.config.vision_config
        return (config.num_channels, config.image_size, config.image_size)

    @property
    def projection(self) -> int:
        """Length of an embedding."""
        return int(self._model.projection_dim)

    def see(self, pictures: Array) -> _Seen:
        """What the whole model makes of a batch of pictures."""
        import torch  # noqa: PLC0415

        with torch.no_grad():
            out = self._model(pixel_values=torch.from_numpy(np.ascontiguousarray(pictures)), **self._labels)
        scores = out.logits_per_image.softmax(dim=1)
        return _Seen(out.vision_model_output.last_hidden_state.numpy(), out.image_embeds.numpy(), scores.numpy())

    def read(self, texts: Sequence[str]) -> _Read:
        """What it makes of a batch of texts."""
        import torch  # noqa: PLC0415

        tokens = self._tokens(texts)
        with torch.no_grad():
            found = self._model.text_model(**tokens)
            embedding = torch.nn.functional.normalize(self._model.text_projection(found.pooler_output), dim=1)
        ids, mask = tokens["input_ids"].numpy(), tokens["attention_mask"].numpy()
        return _Read(ids, mask, found.last_hidden_state.numpy(), embedding.numpy())

    def _tokens(self, texts: Sequence[str]) -> dict[str, Any]:
        found = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}
