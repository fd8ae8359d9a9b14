"""Compares a language model's stages with the whole model: tokens of texts, greedy answers and the logits behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.directory import Report
from models.manifest import GENERATE, Manifest
from models.session import Array
from models.verification import generation, texts
from models.verification.chain import Tokenise
from models.verification.figures import Figure, counted


def compare(
    manifest: Manifest, directory: Path, checkpoint: Checkpoint, rng: np.random.Generator, report: Report
) -> list[Figure]:
    """See `models.verification.Compare`."""
    first = manifest.parts(GENERATE)[0]
    decoders = {precision: generation.Decoder(manifest, directory, precision) for precision in first.files}
    tokenise = Tokenise(manifest, directory)
    report(f"loading {checkpoint.source}")
    model = load_model(checkpoint, "AutoModelForCausalLM")
    generation.check_width(checkpoint, manifest, model.config.hidden_size)
    tokenizer = load_tokenizer(checkpoint)
    asked = texts.batches(tokenizer, tokenise.max_tokens, rng)
    same = [tokens_differ(tokenise, tokenizer, batch) for batch in asked]
    longest = int(first.parameters["context"]) - generation.NEW_TOKENS
    batches = prompts(len(tokenizer), longest, int(first.parameters["pad"]), rng)
    report(f"asking the whole model about {len(batches)} batches of prompts")
    answers = [_answer(model, *batch) for batch in batches]
    figures = [counted(next(iter(decoders)), "batches whose tokens differ", same)]
    for precision, decoder in decoders.items():
        report(f"asking the stages, {precision}")
        figures += generation.compare(decoder, precision, answers, manifest.tolerances[precision])
    return figures


def tokens_differ(tokenise: Tokenise, tokenizer: Any, batch: Sequence[str]) -> bool:
    """Whether a batch of texts has other ids than the checkpoint's own tokenizer gives."""
    ids, mask = tokenise(batch)
    return any(
        list(row[keep == 1]) != tokenizer(text)["input_ids"] for row, keep, text in zip(ids, mask, batch, strict=True)
    )  # fmt: skip


def prompts(vocabulary: int, longest: int, pad: int, rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """Random prompts of several lengths, each alone, and the shorter ones in one batch padded at the left: ids and mask."""
    *each, long = [
        rng.integers(vocabulary, size=min(length, longest)).tolist() for length in (*generation.LENGTHS, generation.LONG)
    ]
    return [generation.left_padded(rows, pad) for rows in (*([prompt] for prompt in (*each, long)), each)]


def _answer(model: Any, ids: Array, mask: Array) -> generation.Answer:
    import torch  # noqa: PLC0415

    inputs, seen = torch.from_numpy(ids), torch.from_numpy(mask)
    made = generation.greedy(model)(input_ids=inputs, attention_mask=seen, return_dict_in_generate=True, output_logits=True)
    embeds = model.get_input_embeddings()(inputs)
    return generation.Answer(
        embeds.detach().numpy(), mask, made.sequences[:, ids.shape[1] :].numpy(), torch.stack(made.logits, dim=1).numpy()
    )
