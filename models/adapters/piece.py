"""What an adapter hands to the exporter: stages, and for each the graph or the files it is made from.

The adapter knows the architecture, the exporter knows ONNX; these three types are all they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from models.manifest import Precision, StageSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Graph:
    """A module to become an ONNX file. Its arguments and results follow the stage's inputs and outputs in order."""

    module: nn.Module
    example: tuple[Tensor, ...]
    """One tensor per input; no symbolic axis may have length 1, which torch.export takes for a constant."""


@dataclass(frozen=True)
class Piece:
    """A stage before its files are written."""

    spec: StageSpec
    """Complete but for `files` and every `bytes_per_item`."""
    graph: Graph | None = None
    assets: Mapping[str, bytes] = field(default_factory=dict)
    """Files that need no export: name -> content; the first is what the processor opens."""


@dataclass(frozen=True)
class Cut:
    """A model taken apart."""

    architecture: str
    """Class of the PyTorch model."""
    pieces: tuple[Piece, ...]
    typical_length: Mapping[str, int]
    """Typical length of each symbolic axis other than batch."""
    bytes_per_element: Mapping[str, int]
    """Typical size of one element [bytes] of each BYTES tensor, by tensor name, its 4-byte length prefix included."""
    tolerances: Mapping[Precision, float]
