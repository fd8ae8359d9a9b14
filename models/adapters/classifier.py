"""Where a text classifier is cut: tokenise | encode | label, with the checkpoint's own head as the light stage `label`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.adapters import encoder, text
from models.adapters.piece import Array, Cut, Piece, linear
from models.checkpoint import Checkpoint, load_model, load_tokenizer
from models.errors import UnsupportedCheckpoint
from models.manifest import Precision, StageSpec, TensorSpec

TYPICAL_LENGTH: Mapping[str, int] = {"seq": 48}
BYTES_PER_ELEMENT: Mapping[str, int] = {"text": 200, "label": 20}
TOLERANCES: Mapping[Precision, float] = {"float32": 1e-4, "float16": 0.02, "int8": 0.5}
"""Of the logits, over the worst of `verify`'s texts: those of classifier-ci spread over 4, and are off by 0.006 in float16 and
by 0.19 in int8."""
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def cut(checkpoint: Checkpoint, parts: int = 1) -> Cut:
    """Take a classifier of texts apart; see `models.adapters.Adapter`. One text at a time: token types are all zero.

    Raises:
        UnsupportedCheckpoint: it is a decoder, has relative positions or a head that is not known, or fewer layers than parts.
        CheckpointError: transformers cannot load it.
    """
    encoder.refuse_variants(checkpoint)
    whole = load_model(checkpoint, "AutoModelForSequenceClassification")
    tokenizer = load_tokenizer(checkpoint)
    model = whole.base_model
    pad_id = text.pad_id_of(tokenizer, model.config)
    return Cut(
        architecture=type(whole).__name__,
        family="bert-classifier",
        pieces=(
            text.tokenise(tokenizer, encoder.max_tokens(model, None), pad_id),
            *encoder.cut(encoder.tower_of_bert(model), pad_id, parts),
            _label(checkpoint, whole),
        ),
        typical_length=TYPICAL_LENGTH,
        bytes_per_element=BYTES_PER_ELEMENT,
        tolerances=TOLERANCES,
    )


def problem(config: Any) -> str:
    """What the logits mean; where the checkpoint does not say, as transformers' own pipeline takes it."""
    return str(config.problem_type or PROBLEMS[1 if config.num_labels == 1 else 0])


def _label(checkpoint: Checkpoint, whole: Any) -> Piece:
    config = whole.config
    classes = int(config.num_labels)
    activation, weights = _head(checkpoint, whole)
    spec = StageSpec(
        name="label",
        tier="light",
        processor="label",
        inputs=(text.states(int(config.hidden_size)),),
        outputs=(
            TensorSpec(name="logits", datatype="FP32", shape=("batch", classes)),
            TensorSpec(name="scores", datatype="FP32", shape=("batch", classes)),
            TensorSpec(name="label", datatype="BYTES", shape=("batch",)),
        ),
        parameters={
            "activation": activation,
            "id2label": [str(config.id2label[i]) for i in range(classes)],
            "problem": problem(config),
        },
    )
    return Piece(spec, assets={"label.npz": weights})


def _head(checkpoint: Checkpoint, whole: Any) -> tuple[str, dict[str, Array]]:
    """Activation and matrices of the head: two layers on the state of the first token, whatever the family calls them."""
    if hasattr(whole, "pre_classifier"):
        first, second, activation = whole.pre_classifier, whole.classifier, "relu"
    elif hasattr(whole.classifier, "out_proj"):
        first, second, activation = whole.classifier.dense, whole.classifier.out_proj, "tanh"
    elif getattr(whole.base_model, "pooler", None) is not None:
        first, second, activation = whole.base_model.pooler.dense, whole.classifier, "tanh"
    else:
        raise UnsupportedCheckpoint(f"{checkpoint.source}: {type(whole).__name__} has a head that no stage computes")
    return activation, {**linear(first, 1), **linear(second, 2)}
