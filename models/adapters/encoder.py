"""The core stage of a BERT-like text encoder: embeddings and layers, written out for the exporter, in one part or several."""

from __future__ import annotations

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


class Part(nn.Module):
    """Consecutive layers of a BERT-like model, and before the first of all the embeddings.

    Same arithmetic as the model's own forward with token types all zero; only the attention mask is built here, because the
    library's mask builder does not trace at symbolic shapes.
    """

    def __init__(self, embeddings: nn.Module | None, stack: Any) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.layers = nn.ModuleList(stack)

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
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden


def cut(model: Any, pad_id: int, parts: int) -> tuple[Piece, ...]:
    """The encoder as `encode`, or as `encode-1` to `encode-N`.

    Raises:
        UnsupportedCheckpoint: fewer layers than parts.
    """
    stack = (model.transformer if hasattr(model, "transformer") else model.encoder).layer
    width, vocabulary = int(model.config.hidden_size), int(model.config.vocab_size)
    cuts = layers.split([layers.work(layer) for layer in stack], parts)
    ids, mask = example(vocabulary)
    pieces = []
    for i, part in enumerate(cuts):
        first, last = i == 0, i == parts - 1
        name = layers.part_name("encode", i, parts)
        spec = StageSpec(
            name=name,
            tier="core",
            processor="onnx",
            inputs=(text.input_ids(pad_id) if first else text.states(width, "hidden"), text.MASK),
            outputs=(text.states(width, "last_hidden_state" if last else "hidden"),),
            max_batch=MAX_BATCH,
            # ONNX counts a negative index from the end, so that a wrong token would get an answer.
            parameters={"range": {"input_ids": [0, vocabulary - 1]}} if first else {},
        )
        module = Part(model.embeddings if first else None, [stack[j] for j in part])
        entering = ids if first else torch.zeros(*ids.shape, width)
        pieces.append(Piece(spec, {name: Graph(module, (entering, mask))}))
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
    if model.embeddings.position_embeddings.padding_idx is not None:
        positions -= int(model.embeddings.position_embeddings.padding_idx) + 1
    return min(positions, stated or positions)


def refuse_variants(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedCheckpoint for a variant whose layers would come out wrong."""
    positions = checkpoint.config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise UnsupportedCheckpoint(f"{checkpoint.source}: position_embedding_type {positions!r}; supported: absolute")
    if checkpoint.config.get("is_decoder"):
        raise UnsupportedCheckpoint(f"{checkpoint.source}: is_decoder is set; only encoders can be cut here")
