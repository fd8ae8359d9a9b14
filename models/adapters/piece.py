"""What an adapter hands to the exporter: stages, and for each the graphs and the files it is made from.

The adapter knows the architecture, the exporter knows ONNX; these types are all they share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from models.manifest import Precision, StageSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = np.ndarray[Any, np.dtype[Any]]
Asset = bytes | Array | Mapping[str, Array]
"""Content of a file as it is, or what goes into an .npy or .npz file."""


@dataclass(frozen=True)
class Graph:
    """A module to become an ONNX file. Its arguments and results follow the inputs and outputs in order.

    A module whose forward ends in `*past` takes the rest of the inputs there.
    """

    module: nn.Module
    example: tuple[Tensor, ...]
    """One tensor per input; no symbolic axis may have length 1, which torch.export takes for a constant."""
    inputs: tuple[TensorSpec, ...] = ()
    """Only where they are not the stage's own (a decoder's graph has its cache besides)."""
    outputs: tuple[TensorSpec, ...] = ()
    """As `inputs`."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """Weight of the module -> the stage's .npy file that holds the same, so that it need not be stored twice."""


@dataclass(frozen=True)
class Piece:
    """A stage before its files are written."""

    spec: StageSpec
    """Complete but for `files` and every `bytes_per_item`."""
    graphs: Mapping[str, Graph] = field(default_factory=dict)
    """Stem of the file's name -> graph; the first is what the processor opens. Each is made in every precision."""
    assets: Mapping[str, Asset] = field(default_factory=dict)
    """Files that need no export and are the same in every precision: name -> content."""


@dataclass(frozen=True)
class Cut:
    """A model taken apart."""

    architecture: str
    """Class of the PyTorch model."""
    family: str
    """Of the adapter; a key of `models.verification.FAMILIES`."""
    pieces: tuple[Piece, ...]
    typical_length: Mapping[str, int]
    """Typical length of each symbolic axis other than batch."""
    bytes_per_element: Mapping[str, int]
    """Typical size of one element [bytes] of each BYTES tensor, by tensor name, its 4-byte length prefix included."""
    tolerances: Mapping[Precision, float]
    """What `verify` accepts in each precision; one that is missing cannot be exported."""


def array(weight: Any) -> Array:
    """A torch weight as it goes into a file of a light stage, float32 and in row-major order."""
    return np.ascontiguousarray(weight.detach().numpy().astype(np.float32))


def linear(layer: Any, number: int) -> dict[str, Array]:
    """A torch Linear as the arrays `wN` (in, out) and, where it has one, `bN` (out,)."""
    bias = {} if layer.bias is None else {f"b{number}": array(layer.bias)}
    return {f"w{number}": array(layer.weight.T), **bias}
