"""Where a BERT-like sentence encoder is cut: tokenise | encode | pool | classify, rank.

Encoding is all the work (some 80 times the rest), so it is the one core stage and everything around it is light. Hidden
states cross the link between `encode` and `pool`, which keeps the encoder free for other heads. `classify` and `rank` compare
embeddings with each other and need no weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from models import sentence
from models.adapters import encoder, text
from models.adapters.piece import Cut, Piece
from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.manifest import Precision, StageSpec, TensorSpec

TYPICAL_LENGTH: Mapping[str, int] = {"seq": 48, "labels": 4, "queries": 1, "documents": 8}
BYTES_PER_ELEMENT: Mapping[str, int] = {"text": 200, "labels": 20, "label": 20}
"""48 word pieces make about 200 bytes of English."""
TOLERANCES: Mapping[Precision, float] = {"float32": 1e-4, "float16": 1e-4, "int8": 0.04}
"""Over the worst of `verify`'s texts. MiniLM as float16 loses 2e-6. As int8 it loses 0.01 on ordinary text, but up to 0.03 on
an empty or one-word text batched with long ones: activations share one scale per batch. Leaving out the worst matrices costs
40 % of the speed."""


def cut(checkpoint: Checkpoint, parts: int = 1) -> Cut:
    """Take a BERT-like checkpoint apart; see `models.adapters.Adapter`.

    Raises:
        UnsupportedCheckpoint: it is a decoder, has relative positions, pools in a way that no stage computes, or has fewer
            layers than parts.
        CheckpointError: transformers cannot load it.
    """
    encoder.refuse_variants(checkpoint)
    settings = sentence.read(checkpoint)
    model = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    hidden = int(model.config.hidden_size)
    pad_id = text.pad_id_of(tokenizer, model.config)
    light = (_pool(hidden, settings), _classify(hidden), _rank(hidden))
    return Cut(
        architecture=type(model).__name__,
        family="bert",
        pieces=(
            text.tokenise(tokenizer, encoder.max_tokens(model, settings.max_tokens), pad_id),
            *encoder.cut(encoder.tower_of_bert(model), pad_id, parts),
            *(Piece(spec) for spec in light),
        ),
        typical_length=TYPICAL_LENGTH,
        bytes_per_element=BYTES_PER_ELEMENT,
        tolerances=TOLERANCES,
    )


def _pool(hidden: int, settings: sentence.SentenceSettings) -> StageSpec:
    return StageSpec(
        name="pool",
        tier="light",
        processor="pool",
        inputs=(text.states(hidden), text.MASK),
        outputs=(TensorSpec(name="embedding", datatype="FP32", shape=("batch", hidden)),),
        parameters={"mode": settings.mode, "normalise": settings.normalise},
    )


def _classify(hidden: int) -> StageSpec:
    return StageSpec(
        name="classify",
        tier="light",
        processor="classify",
        inputs=(
            TensorSpec(name="embedding", datatype="FP32", shape=("batch", hidden)),
            TensorSpec(name="label_embeddings", datatype="FP32", shape=("labels", hidden)),
            TensorSpec(name="labels", datatype="BYTES", shape=("labels",)),
        ),
        outputs=(
            TensorSpec(name="scores", datatype="FP32", shape=("batch", "labels")),
            TensorSpec(name="label", datatype="BYTES", shape=("batch",)),
        ),
    )


def _rank(hidden: int) -> StageSpec:
    return StageSpec(
        name="rank",
        tier="light",
        processor="rank",
        inputs=(
            TensorSpec(name="query_embedding", datatype="FP32", shape=("queries", hidden)),
            TensorSpec(name="document_embeddings", datatype="FP32", shape=("documents", hidden)),
        ),
        outputs=(
            TensorSpec(name="scores", datatype="FP32", shape=("queries", "documents")),
            TensorSpec(name="order", datatype="INT64", shape=("queries", "documents")),
        ),
    )
