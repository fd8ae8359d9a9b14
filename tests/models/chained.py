"""A decoder's parts run in PyTorch, without an export: what an adapter's modules compute, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.adapters.piece import Cut, Piece


def named(cut: Cut, name: str) -> list[Piece]:
    """The stage of that name, or its parts in order."""
    return [piece for piece in cut.pieces if piece.spec.name.split("-")[0] == name]


def greedy(
    pieces: Sequence[Piece], embeds: Tensor, mask: Tensor, new: int, *, chunk: int | None = None, heard: Tensor | None = None
) -> list[list[int]]:
    """The likeliest tokens, one after the other, `new` for each row.

    Args:
        pieces: The parts of `generate`, in order.
        embeds: Of the prompts, float32 [batch, seq, hidden].
        mask: 1 for a token of the prompt, int64 [batch, seq].
        new: How many tokens to make.
        chunk: Positions of the prompt taken at once; None takes all.
        heard: What cross-attention attends to.
    """
    parts = [_Part(piece, len(mask), heard) for piece in pieces]
    first = pieces[0]
    suppress, begin = first.spec.parameters["suppress"], first.spec.parameters["begin_suppress"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    made: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, embeds.shape[1], chunk or embeds.shape[1]):
            stop = min(start + (chunk or embeds.shape[1]), embeds.shape[1])
            logits = _through(parts, embeds[:, start:stop], mask[:, :stop], places[:, start:stop])
        while len(made) < new:
            logits[:, suppress] = -torch.inf
            if not made:
                logits[:, begin] = -torch.inf
            made.append(logits.argmax(1))
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.int64)], dim=1)
            place = places[:, -1:] + len(made)
            logits = _through(parts, embed(first, made[-1][:, None], place), mask, place)
    return torch.stack(made, dim=1).tolist()


def embed(first: Piece, ids: Tensor, places: Tensor) -> Tensor:
    """Embeddings by the tables among the first part's files."""
    tables = {name.split("-")[-1]: torch.as_tensor(table) for name, table in first.assets.items()}
    found: Tensor = tables["embedding.npy"][ids]
    return found + tables["positions.npy"][places] if "positions.npy" in tables else found


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of a batch."""
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])


def _through(parts: Sequence[_Part], hidden: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    for part in parts:
        hidden = part.run(hidden, mask, places)
    return hidden


class _Part:
    def __init__(self, piece: Piece, batch: int, heard: Tensor | None) -> None:
        self._graph, *others = piece.graphs.values()
        spec = piece.spec.parameters
        empty = torch.zeros(batch, spec["kv_heads"], 0, spec["head_dim"])
        self._cache: dict[str, Any] = {t.name: empty for t in self._graph.inputs if t.name.startswith("past_")}
        if heard is not None:
            (cross,) = others
            with torch.no_grad():
                made = cross.module(heard)
            self._cache |= dict(zip([tensor.name for tensor in cross.outputs], made, strict=True))

    def run(self, hidden: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """What leaves the part."""
        given = {"attention_mask": mask, "position_ids": places, **self._cache}
        leaving, *present = self._graph.module(hidden, *(given[tensor.name] for tensor in self._graph.inputs[1:]))
        names = [tensor.name.replace("present_", "past_") for tensor in self._graph.outputs[1:]]
        self._cache |= dict(zip(names, present, strict=True))
        result: Tensor = leaving
        return result
