"""The core stage that sees: CLIP's vision transformer, in one part or several, for every family that has one.

It gives the states of its last layer as they are, before any norm or projection, so that one service can serve an image
embedding and a vision-language model at once; what each makes of them is in its own light stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.adapters import layers
from models.adapters.piece import Graph, Piece
from models.manifest import StageSpec, TensorSpec

MAX_BATCH = 8
"""On a CPU a larger batch gains nothing (1.0 to 1.1 times the throughput at 8) and keeps urgent tasks waiting."""


class Part(nn.Module):
    """Consecutive layers of a vision transformer, and before the first of all the embedding of its patches."""

    def __init__(self, model: Any, chosen: range, penultimate: bool) -> None:
        super().__init__()
        first = chosen.start == 0
        self.embeddings = model.embeddings if first else None
        self.norm = model.pre_layrnorm if first else None
        self.layers = nn.ModuleList([model.encoder.layers[i] for i in chosen])
        self._penultimate = penultimate

    def forward(self, entering: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states of the part's last layer, and those that enter that layer where they are asked for.

        Args:
            entering: Pixels, float32 [batch, 3, height, width], or the states of the part before, float32 [batch, tokens, d].

        Returns:
            float32 [batch, tokens, d]; the first token is the class token, the others are the patches, row by row.
        """
        hidden: Tensor = entering
        if self.embeddings is not None and self.norm is not None:
            hidden = self.norm(self.embeddings(entering))
        before = hidden
        for layer in self.layers:
            before, hidden = hidden, layer(hidden, None)
        return (hidden, before) if self._penultimate else hidden


def cut(model: Any, parts: int, penultimate: bool = False) -> tuple[Piece, ...]:
    """A CLIPVisionModel as the stage `vision`, or as `vision-1` to `vision-N`.

    Args:
        model: In PyTorch.
        parts: How many.
        penultimate: Whether to give `penultimate_hidden_state` as well, which some vision-language models look at.

    Raises:
        UnsupportedCheckpoint: fewer layers than parts.
    """
    width, side = int(model.config.hidden_size), int(model.config.image_size)
    tokens = int(model.embeddings.num_positions)
    patches = layers.work(model.embeddings) * (tokens - 1) / tokens
    cuts = layers.split([layers.work(layer) for layer in model.encoder.layers], parts, before=patches)
    pixels = TensorSpec(name="pixel_values", datatype="FP32", shape=("batch", int(model.config.num_channels), side, side))

    def states(name: str) -> TensorSpec:
        return TensorSpec(name=name, datatype="FP32", shape=("batch", tokens, width))

    final = (states("last_hidden_state"), *([states("penultimate_hidden_state")] if penultimate else []))
    pieces = []
    for i, chosen in enumerate(cuts):
        first, last = i == 0, i == parts - 1
        name = layers.part_name("vision", i, parts)
        spec = StageSpec(
            name=name,
            tier="core",
            processor="onnx",
            inputs=(pixels if first else states("hidden"),),
            outputs=final if last else (states("hidden"),),
            max_batch=MAX_BATCH,
        )
        fixed = [axis for axis in spec.inputs[0].shape if isinstance(axis, int)]
        module = Part(model, chosen, penultimate and last)
        pieces.append(Piece(spec, {name: Graph(module, (torch.zeros(2, *fixed),))}))
    return tuple(pieces)
