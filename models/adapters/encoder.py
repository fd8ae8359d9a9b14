"""The core stage of a text encoder: embeddings and layers, written out for the exporter, in one part or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.adapters import layers, text
from models.adapters.piece import Graph, Piece
from models.checkpoint import Checkpoint
from models.errors import UnsupportedCheckpoint
from models.manifest import StageSpec

MAX_BATCH = 16
"""On a CPU a larger batch of an encoder gains nothing and keeps urgent tasks waiting."""


@dataclass(frozen=True)
class Tower:
    """What a text encoder is made of."""

    name: str
    """Of the stage."""
    embeddings: nn.Module
    layers: Any
    """An nn.ModuleList, each called with hidden states and an additive mask."""
    width: int
    """Length of a hidden state."""
    vocabulary: int
    norm: nn.Module | None = None
    """After the last layer."""
    causal: bool = False
    """Whether a token sees only those before it."""


def tower_of_bert(model: Any) -> Tower:
    """The encoder of a BERT-like model without heads."""
    stack = (model.transformer if hasattr(model, "transformer") else model.encoder).layer
    return Tower("encode", model.embeddings, stack, int(model.config.hidden_size), int(model.config.vocab_size))


class Part(nn.Module):
    """Consecutive layers, before the first of all the embeddings, after the last the norm if there is one.

    Same arithmetic as the model's own forward with token types all zero; only the attention mask is built here, because the
    library's mask builder does not trace at symbolic shapes.
    """

    def __init__(self, tower: Tower, chosen: range) -> None:
        super().__init__()
        last = chosen.stop == len(tower.layers)
        self.embeddings = tower.embeddings if chosen.start == 0 else None
        self.layers = nn.ModuleList([tower.layers[i] for i in chosen])
        self.norm = tower.norm if last and tower.norm is not None else nn.Identity()
        self._causal = tower.causal

    def forward(self, entering: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states of the part's last layer.

        Args:
            entering: Token ids, int64 [batch, seq], or the hidden states of the part before, float32 [batch, seq, hidden].
            attention_mask: 1 for a token, 0 for padding, int64 [batch, seq].

        Returns:
            float32 [batch, seq, hidden]; what stands at padding is without meaning.
        """
        hidden: Tensor = entering if self.embeddings is None else self.embeddings(input_ids=entering)
        bias = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        bias = bias.expand(-1, 1, hidden.shape[1], -1)  # ONNX Runtime's CPU Attention does not broadcast the query axis
        if self._causal:
            place = torch.arange(hidden.shape[1])
            later = place[None, :] > place[:, None]
            bias = bias.masked_fill(later[None, None], torch.finfo(hidden.dtype).min)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        states: Tensor = self.norm(hidden)
        return states


def cut(tower: Tower, pad_id: int, parts: int) -> tuple[Piece, ...]:
    """The encoder as a stage of its name, or as `NAME-1` to `NAME-N`.

    Raises:
        UnsupportedCheckpoint: fewer layers than parts.
    """
    cuts = layers.split([layers.work(layer) for layer in tower.layers], parts)
    ids, mask = example(tower.vocabulary)
    pieces = []
    for i, chosen in enumerate(cuts):
        first, last = i == 0, i == parts - 1
        name = layers.part_name(tower.name, i, parts)
        spec = StageSpec(
            name=name,
            tier="core",
            processor="onnx",
            inputs=(text.input_ids(pad_id) if first else text.states(tower.width, "hidden"), text.MASK),
            outputs=(text.states(tower.width, "last_hidden_state" if last else "hidden"),),
            max_batch=MAX_BATCH,
            # ONNX counts a negative index from the end, so that a wrong token would get an answer.
            parameters={"range": {"input_ids": [0, tower.vocabulary - 1]}} if first else {},
        )
        entering = ids if first else torch.zeros(*ids.shape, tower.width)
        pieces.append(Piece(spec, {name: Graph(Part(tower, chosen), (entering, mask))}))
    return tuple(pieces)


def example(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Token ids and a mask, int64 [2, 8], to trace with."""
    ids = torch.arange(2 * 8).reshape(2, 8) % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # a mask of ones only could be folded away
    return ids, mask


def max_tokens(model: Any, stated: int | None) -> int:
    """Longest text [tokens]. RoBERTa counts positions from after the padding id, and so has room for fewer."""
    positions = int(model.config.max_position_embeddings)
    table = model.embeddings.position_embeddings
    if table.padding_idx is not None:
        positions -= int(table.padding_idx) + 1
    return min(positions, stated or positions)


def refuse_variants(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedCheckpoint for a variant whose layers would come out wrong."""
    positions = checkpoint.config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise UnsupportedCheckpoint(f"{checkpoint.source}: position_embedding_type {positions!r}; supported: absolute")
    if checkpoint.config.get("is_decoder"):
        raise UnsupportedCheckpoint(f"{checkpoint.source}: is_decoder is set; only encoders can be cut here")
