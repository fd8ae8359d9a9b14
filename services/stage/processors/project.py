"""Token states to embeddings: which tokens count, a layer norm, one or two dense layers, unit length. Pure numpy.

This is CLIP's way from an encoder to the space that images and texts share, and LLaVA's from an image's patches to what its
decoder reads as tokens. The heads of classifiers (`services.stage.processors.label`) have the same dense layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from models.manifest import ManifestError, StageSpec
from services.dataplane.wire import Array
from services.stage.processors.pool import unit

SELECTIONS = ("first", "eos", "patches", "all")
INLINE_FLOP = 1e7
"""Multiplications of one item up to which a run belongs in the event loop: a third of a millisecond of one core."""


@dataclass(frozen=True, slots=True)
class Dense:
    """y = act(x w1 + b1) w2 + b2, shapes (in, out); without w2, y = act(x w1 + b1). A bias that is None is left out."""

    w1: Array
    b1: Array | None
    activation: Callable[[Array], Array]
    w2: Array | None
    b2: Array | None

    def __call__(self, x: Array) -> Array:
        """FP32 (..., in) -> (..., out)."""
        y = self.activation(_affine(x, self.w1, self.b1))
        return y if self.w2 is None else _affine(y, self.w2, self.b2)

    @property
    def widths(self) -> tuple[int, int]:
        """Lengths of a vector that goes in and of one that comes out."""
        last = self.w1 if self.w2 is None else self.w2
        return self.w1.shape[0], last.shape[1]

    @property
    def flop(self) -> int:
        """Multiplications for one vector."""
        return self.w1.size + (0 if self.w2 is None else self.w2.size)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""

    weight: Array
    bias: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        """FP32 in and out, the same shape."""
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        normed: Array = centred / np.sqrt(variance + np.float32(self.eps)) * self.weight + self.bias
        return normed


class Project:
    """States FP32 [batch, tokens, d], and `input_ids` for `eos` -> an embedding [batch, p], or one per token [batch, n, p]."""

    def __init__(
        self,
        names: tuple[str, str],
        select: str,
        eos_id: int | None,
        norm: LayerNorm | None,
        dense: Dense,
        *,
        normalise: bool,
        inline: bool,
    ) -> None:
        self._states, self._embedding = names
        self._select = select
        self._eos_id = eos_id
        self._norm = norm
        self._dense = dense
        self._normalise = normalise
        self.inline = inline

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Select, normalise, project."""
        x = self._chosen(inputs[self._states], inputs)
        if self._norm is not None:
            x = self._norm(x)
        embedding = self._dense(x)
        return {self._embedding: unit(embedding) if self._normalise else embedding}

    def describe(self) -> dict[str, Any]:
        """What is selected and how wide the embedding is."""
        return {"select": self._select, "width": self._dense.widths[1], "normalise": self._normalise}

    def _chosen(self, states: Array, inputs: Mapping[str, Array]) -> Array:
        if self._select == "first":
            first: Array = states[:, 0]
            return first
        if self._select == "eos":
            ids = inputs["input_ids"]
            # The first end of text; checkpoints older than that id tell it by its being the largest of the vocabulary.
            place = np.argmax(ids if self._eos_id is None else ids == self._eos_id, axis=1)
            ends: Array = states[np.arange(len(states)), place]
            return ends
        tokens: Array = states[:, 1:] if self._select == "patches" else states
        return tokens


def open_processor(spec: StageSpec, files: tuple[Path, ...], threads: int) -> Project:
    """Load the weights; see `services.stage.processors`.

    Parameters: `select` one of SELECTIONS, `eos_id` (null: the largest id), `activation`, `layer_norm_eps`, `normalise`. The
    file has `w1`, and as far as there are any `b1`, `w2`, `b2`, `ln_weight`, `ln_bias`.
    """
    del threads
    given = spec.parameters
    select = given["select"]
    if select not in SELECTIONS:
        raise ManifestError(f"stage {spec.name!r}: selection {select!r} is not one of {', '.join(SELECTIONS)}")
    arrays = load_arrays(spec, files)
    dense = dense_of(spec, arrays, given.get("activation"))
    norm = _norm_of(spec, arrays)
    states, embedding = spec.inputs[0], spec.outputs[0]
    if (states.shape[-1], embedding.shape[-1]) != dense.widths:
        raise ManifestError(
            f"{files[0].name} leads from {dense.widths[0]} to {dense.widths[1]} numbers, not from {states.shape[-1]} to "
            f"{embedding.shape[-1]} as the manifest says; export the model again"
        )
    vectors = math.prod(n for n in embedding.shape[:-1] if isinstance(n, int))
    return Project(
        (states.name, embedding.name),
        select,
        given.get("eos_id"),
        norm,
        dense,
        normalise=bool(given.get("normalise", False)),
        inline=vectors * dense.flop <= INLINE_FLOP,
    )


def _norm_of(spec: StageSpec, arrays: Mapping[str, Array]) -> LayerNorm | None:
    weight, bias = arrays.get("ln_weight"), arrays.get("ln_bias")
    if weight is None and bias is None:
        return None
    width = spec.inputs[0].shape[-1:]
    if weight is None or bias is None or weight.shape != width or bias.shape != width:
        raise ManifestError(f"stage {spec.name!r}: ln_weight and ln_bias do not make a norm of {width}; export the model again")
    return LayerNorm(weight, bias, float(spec.parameters["layer_norm_eps"]))


# --- shared with `label` --------------------------------------------------------------------------------------------------


def load_arrays(spec: StageSpec, files: tuple[Path, ...]) -> dict[str, Array]:
    """The arrays of a stage's .npz by name, FP32; raises ManifestError where there is none or it cannot be read."""
    if not files:
        raise ManifestError(f"stage {spec.name!r} needs its weights; export the model again (espalier export)")
    try:
        with files[0].open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: np.ascontiguousarray(archive[name], np.float32) for name in archive.files}
    except (ValueError, OSError, BadZipFile) as error:
        raise ManifestError(f"{files[0].name}: no weights ({error}); export the model again (espalier export)") from None


def dense_of(spec: StageSpec, arrays: Mapping[str, Array], activation: str | None) -> Dense:
    """The dense layers among a stage's arrays; raises ManifestError where they do not fit each other."""
    if activation not in ACTIVATIONS:
        known = ", ".join(name for name in ACTIVATIONS if name)
        raise ManifestError(f"stage {spec.name!r}: activation {activation!r} is not one of {known}")
    w1, b1, w2, b2 = (arrays.get(name) for name in ("w1", "b1", "w2", "b2"))
    fit = w1 is not None and w1.ndim == 2 and (b1 is None or b1.shape == w1.shape[1:])
    fit = fit and (w2 is None or (w1 is not None and w2.shape[:1] == w1.shape[1:] and (b2 is None or b2.shape == w2.shape[1:])))
    if w1 is None or not fit:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise ManifestError(f"stage {spec.name!r}: its weights do not make a layer: {shapes}; export the model again")
    return Dense(w1, b1, ACTIVATIONS[activation], w2, b2)


def _affine(x: Array, weight: Array, bias: Array | None) -> Array:
    y: Array = x @ weight
    return y if bias is None else y + bias


def _identity(x: Array) -> Array:
    return x


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)); FP32 in and out, the same shape."""
    # By the hyperbolic tangent, which overflows nowhere.
    y: Array = 0.5 * (np.tanh(0.5 * x) + 1.0)
    return y


def _gelu(x: Array) -> Array:
    y: Array = 0.5 * x * (1.0 + erf(x * np.float32(math.sqrt(0.5))))
    return y


def _gelu_tanh(x: Array) -> Array:
    y: Array = 0.5 * x * (1.0 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
    return y


def _quick_gelu(x: Array) -> Array:
    return x * sigmoid(np.float32(1.702) * x)


def _silu(x: Array) -> Array:
    return x * sigmoid(x)


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


ACTIVATIONS: Mapping[str | None, Callable[[Array], Array]] = {
    None: _identity,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "silu": _silu,
    "tanh": np.tanh,
}
"""By the manifest's names; `gelu_tanh` is what transformers calls gelu_new and gelu_pytorch_tanh."""


def erf(x: Array) -> Array:
    """Error function within 5e-7: 1 - (a1 t + ... + a5 t^5) exp(-x^2) with t = 1 / (1 + p |x|), odd in x.

    x and result FP32 of any shape. Source: Abramowitz and Stegun 1964, 7.1.26; numpy has none, and scipy's would cost a light
    stage half of its memory again.
    """
    size = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * size)
    series: Array = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(coefficient)
    y: Array = np.copysign(1 - series * t * np.exp(-size * size), x)
    return y
