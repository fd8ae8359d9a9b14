"""Compares a speech model's stages with the whole model: the encoder's states, greedy transcriptions and their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.adapters.whisper import LANGUAGE
from models.checkpoint import Checkpoint, load_model, load_preprocessor
from models.directory import Report
from models.manifest import GENERATE, Manifest
from models.session import Array
from models.verification import generation
from models.verification.chain import Core
from models.verification.figures import Figure, measure, worst

BATCHES = (1, 1, 1, 4)
"""Windows of audio in each batch."""


def compare(
    manifest: Manifest, directory: Path, checkpoint: Checkpoint, rng: np.random.Generator, report: Report
) -> list[Figure]:
    """See `models.verification.Compare`."""
    first = manifest.parts(GENERATE)[0]
    encoders = {precision: Core(manifest, directory, "encoder", precision) for precision in first.files}
    decoders = {precision: generation.Decoder(manifest, directory, precision) for precision in first.files}
    report(f"loading {checkpoint.source}")
    model = load_model(checkpoint, "WhisperForConditionalGeneration")
    extractor = load_preprocessor(checkpoint, "WhisperFeatureExtractor")
    generation.check_width(checkpoint, manifest, model.config.d_model)
    report(f"asking the whole model about {len(BATCHES)} batches of audio")
    heard = [_features(extractor, batch, rng) for batch in BATCHES]
    states = [_states(model, features) for features in heard]
    embed = next(iter(decoders.values())).embed  # the same table in every precision
    answers = [
        _answer(model, features, true, first.parameters["prefix"], embed) for features, true in zip(heard, states, strict=True)
    ]
    figures: list[Figure] = []
    for precision, decoder in decoders.items():
        report(f"asking the stages, {precision}")
        tolerance = manifest.tolerances[precision]
        got = [encoders[precision](input_features=features)["last_hidden_state"] for features in heard]
        distance, called = measure(precision)
        values = [value for mine, true in zip(got, states, strict=True) for value in distance(mine, true)]
        figures.append(worst(precision, f"hidden states, {called}", values, tolerance))
        figures += generation.compare(decoder, precision, answers, tolerance)
    return figures


def _features(extractor: Any, batch: int, rng: np.random.Generator) -> Array:
    """Log-mel features of tones that wander through noise, some too short for the window, float32 [batch, mels, frames]."""
    rate = extractor.sampling_rate
    sounds = []
    for _ in range(batch):
        t = np.arange(int(rate * extractor.chunk_length * rng.uniform(0.3, 1.0))) / rate
        pitch = rng.uniform(100, 2000) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.5, 4) * t))
        sound = rng.uniform(0.1, 0.9) * np.sin(2 * np.pi * np.cumsum(pitch) / rate) + rng.normal(0, 0.05, len(t))
        sounds.append(sound.astype(np.float32))
    features: Array = extractor(sounds, sampling_rate=rate, return_tensors="np")["input_features"]
    return features


def _states(model: Any, features: Array) -> Array:
    import torch  # noqa: PLC0415

    with torch.no_grad():
        states: Array = model.model.encoder(torch.from_numpy(features)).last_hidden_state.numpy()
    return states


def _answer(
    model: Any, features: Array, states: Array, prefix: list[int], embed: Callable[[Array, Array], Array]
) -> generation.Answer:
    """The whole model's transcriptions, and the logits of one run over all of each, without a cache."""
    import torch  # noqa: PLC0415

    batch, new = len(features), generation.NEW_TOKENS
    settings = model.generation_config
    settings.eos_token_id = None  # an answer does not stop early, so that every token of it is compared
    language = getattr(settings, "language", None) or LANGUAGE
    asked = {"language": language} if getattr(settings, "lang_to_id", None) else {}
    with torch.no_grad():
        made = model.generate(torch.from_numpy(features), max_new_tokens=new, do_sample=False, num_beams=1, **asked).numpy()
        if made.shape[1] > new:  # some versions begin with the prefix
            made = made[:, -new:]
        tokens = np.full((batch, new), settings.pad_token_id, np.int64)  # tokens that pad are cut off the end
        tokens[:, : made.shape[1]] = made
        given = np.concatenate([np.tile(np.array(prefix, np.int64), (batch, 1)), tokens], axis=1)
        logits = model(torch.from_numpy(features), decoder_input_ids=torch.from_numpy(given)).logits.numpy()
    places = np.arange(len(prefix))[None]
    embeds = embed(given[:, : len(prefix)], places)
    behind = logits[:, len(prefix) - 1 : -1]
    return generation.Answer(embeds, np.ones((batch, len(prefix)), np.int64), tokens, behind, states)
