"""Where a CLIP is cut: preprocess | vision | image_head, tokenise | text | text_head, and match where the two meet.

The two encoders are the work; all else is light. The heads (last norm, projection, unit length) are stages of their own, which
leaves the vision encoder free for other models, and `match` scores pictures against labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.adapters import encoder, image, text, vision
from models.adapters.piece import Cut, Piece, array, linear
from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.manifest import Precision, StageSpec, TensorSpec

TYPICAL_LENGTH: Mapping[str, int] = {"seq": 12, "labels": 4}
BYTES_PER_ELEMENT: Mapping[str, int] = {"image": image.BYTES_PER_IMAGE, "text": 45, "labels": 20, "label": 20}
TOLERANCES: Mapping[Precision, float] = {"float32": 1e-4, "float16": 1e-4, "int8": 0.01}
"""Over the worst of `verify`'s pictures and texts. Measured with clip-tiny and clip-small: 1e-6 in float16, 6e-4 in int8."""
_LEGACY_EOS = 2
"""Configurations from before transformers 4.31 say 2, whatever the token's id: the largest id of a text is meant then."""


def cut(checkpoint: Checkpoint, parts: int = 1) -> Cut:
    """Take a CLIP apart; see `models.adapters.Adapter`.

    Raises:
        UnsupportedCheckpoint: its image processor does what no stage computes, or it has fewer layers than parts.
        CheckpointError: transformers cannot load it.
    """
    model = load_model(checkpoint, "CLIPModel")
    tokenizer = load_tokenizer(checkpoint)
    seeing, reading = model.vision_model, model.text_model
    pad_id = text.pad_id_of(tokenizer, reading.config)
    tower = encoder.Tower(
        "text",
        reading.embeddings,
        reading.encoder.layers,
        int(reading.config.hidden_size),
        int(reading.config.vocab_size),
        norm=reading.final_layer_norm,
        causal=True,
    )
    return Cut(
        architecture=type(model).__name__,
        family="clip",
        pieces=(
            image.preprocess(checkpoint, int(seeing.config.image_size)),
            *vision.cut(seeing, parts),
            _image_head(model),
            text.tokenise(tokenizer, int(reading.config.max_position_embeddings), pad_id),
            *encoder.cut(tower, pad_id, parts),
            _text_head(model, pad_id),
            _match(model),
        ),
        typical_length=TYPICAL_LENGTH,
        bytes_per_element=BYTES_PER_ELEMENT,
        tolerances=TOLERANCES,
    )


def _embedding(model: Any, name: str) -> TensorSpec:
    return TensorSpec(name=name, datatype="FP32", shape=("batch", int(model.projection_dim)))


def _image_head(model: Any) -> Piece:
    seeing = model.vision_model
    states = text.states(int(seeing.config.hidden_size), axis=int(seeing.embeddings.num_positions))
    norm = seeing.post_layernorm
    spec = StageSpec(
        name="image_head",
        tier="light",
        processor="project",
        inputs=(states,),
        outputs=(_embedding(model, "image_embedding"),),
        parameters={"select": "first", "layer_norm_eps": norm.eps, "normalise": True, "activation": None},
    )
    weights = {
        "ln_weight": array(norm.weight),
        "ln_bias": array(norm.bias),
        **linear(model.visual_projection, 1),
    }
    return Piece(spec, assets={"image_head.npz": weights})


def _text_head(model: Any, pad_id: int) -> Piece:
    reading = model.text_model.config
    eos = int(reading.eos_token_id)
    spec = StageSpec(
        name="text_head",
        tier="light",
        processor="project",
        inputs=(text.states(int(reading.hidden_size)), text.input_ids(pad_id)),
        outputs=(_embedding(model, "text_embedding"),),
        parameters={
            "select": "eos",
            "eos_id": None if eos == _LEGACY_EOS else eos,
            "normalise": True,
            "activation": None,
        },
    )
    return Piece(spec, assets={"text_head.npz": linear(model.text_projection, 1)})


def _match(model: Any) -> Piece:
    width = int(model.projection_dim)
    spec = StageSpec(
        name="match",
        tier="light",
        processor="match",
        inputs=(
            TensorSpec(name="image_embedding", datatype="FP32", shape=("batch", width)),
            TensorSpec(name="label_embeddings", datatype="FP32", shape=("labels", width)),
            TensorSpec(name="labels", datatype="BYTES", shape=("labels",)),
        ),
        outputs=(
            TensorSpec(name="scores", datatype="FP32", shape=("batch", "labels")),
            TensorSpec(name="label", datatype="BYTES", shape=("batch",)),
        ),
        parameters={"scale": math.exp(model.logit_scale.item())},
    )
    return Piece(spec)
