"""Compares a vision-language model's stages with the whole model: image embeddings, greedy answers and their logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.directory import Report
from models.manifest import GENERATE, Manifest
from models.session import Array
from models.verification import generation, texts
from models.verification.chain import Core, Tokenise, weights
from models.verification.figures import Figure, counted, measure, worst
from models.verification.llama import tokens_differ

QUESTIONS = ((3,), (9,), (17,), (2, 5, 12))
"""Tokens of the prompts in each batch, the image's own not counted."""


def compare(
    manifest: Manifest, directory: Path, checkpoint: Checkpoint, rng: np.random.Generator, report: Report
) -> list[Figure]:
    """See `models.verification.Compare`."""
    first = manifest.parts(GENERATE)[0]
    encoders = {precision: Core(manifest, directory, "vision", precision) for precision in first.files}
    decoders = {precision: generation.Decoder(manifest, directory, precision) for precision in first.files}
    project = _Project(manifest, directory)
    tokenise = Tokenise(manifest, directory)
    report(f"loading {checkpoint.source}")
    model = load_model(checkpoint, "LlavaForConditionalGeneration")
    generation.check_width(checkpoint, manifest, model.config.text_config.hidden_size)
    tokenizer = load_tokenizer(checkpoint)
    same = [tokens_differ(tokenise, tokenizer, batch) for batch in texts.batches(tokenizer, 64, rng)]
    report(f"asking the whole model about {len(QUESTIONS)} batches of pictures")
    channels, height, width = map(int, manifest.parts("vision")[0].inputs[0].shape[1:])
    seen = [rng.normal(size=(len(batch), channels, height, width)).astype(np.float32) for batch in QUESTIONS]
    true = [_embeddings(model, each) for each in seen]
    answers = [
        _answer(model, each, _prompts(first.parameters, len(tokenizer), lengths, embeddings.shape[1], rng), embeddings)
        for each, lengths, embeddings in zip(seen, QUESTIONS, true, strict=True)
    ]
    figures = [counted(next(iter(decoders)), "batches whose tokens differ", same)]
    for precision, decoder in decoders.items():
        report(f"asking the stages, {precision}")
        tolerance = manifest.tolerances[precision]
        got = [project(encoders[precision](pixel_values=each)) for each in seen]
        distance, called = measure(precision)
        values = [value for mine, theirs in zip(got, true, strict=True) for value in distance(mine, theirs)]
        figures.append(worst(precision, f"image embeddings, {called}", values, tolerance))
        figures += generation.compare(decoder, precision, answers, tolerance)
    return figures


class _Project:
    """The stage `project` in numpy."""

    def __init__(self, manifest: Manifest, directory: Path) -> None:
        stage = manifest.stage("project")
        self._stage = stage
        self._weights = weights(stage, directory)

    def __call__(self, states: dict[str, Array]) -> Array:
        hidden = states[self._stage.inputs[0].name]
        if self._stage.parameters["select"] == "patches":
            hidden = hidden[:, 1:]
        inner = self._affine(hidden, 1)
        return self._affine(_ACTIVATIONS[self._stage.parameters["activation"]](inner), 2)

    def _affine(self, x: Array, number: int) -> Array:
        y: Array = x @ self._weights[f"w{number}"]
        bias = self._weights.get(f"b{number}")
        return y if bias is None else y + bias


def _gelu(x: Array) -> Array:
    gauss: Array = np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))
    result: Array = x * (1 + gauss) / 2
    return result


def _gelu_tanh(x: Array) -> Array:
    result: Array = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return result


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


_ACTIVATIONS = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu": _relu}


def _embeddings(model: Any, pixels: Array) -> Array:
    """What the whole model makes of pictures, float32 [batch, patches, hidden]."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        found = model.get_image_features(pixel_values=torch.from_numpy(pixels), return_dict=True).pooler_output
        embeddings: Array = torch.stack(list(found)).numpy()
    return embeddings


def _prompts(
    parameters: Any, vocabulary: int, lengths: tuple[int, ...], patches: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Random prompts with an image somewhere in each, padded at the left: ids and mask."""
    token = int(parameters["image_token"])
    others = [i for i in range(vocabulary) if i != token]
    rows = []
    for length in lengths:
        words = rng.choice(others, size=length).tolist()
        place = int(rng.integers(length))
        rows.append([*words[:place], *[token] * patches, *words[place:]])
    return generation.left_padded(rows, int(parameters["pad"]))


def _answer(model: Any, pixels: Array, prompts: tuple[Array, Array], embeddings: Array) -> generation.Answer:
    import torch  # noqa: PLC0415

    ids, mask = prompts
    inputs, keep = torch.from_numpy(ids), torch.from_numpy(mask)
    made = generation.greedy(model)(
        input_ids=inputs,
        attention_mask=keep,
        pixel_values=torch.from_numpy(pixels),
        return_dict_in_generate=True,
        output_logits=True,
    )
    embeds = model.get_input_embeddings()(inputs).detach().numpy()
    # A row's image tokens stand in the order of its patches.
    embeds[ids == model.config.image_token_id] = embeddings.reshape(-1, embeddings.shape[2])
    tokens = made.sequences[:, ids.shape[1] :].numpy()
    return generation.Answer(embeds, mask, tokens, torch.stack(made.logits, dim=1).numpy())
