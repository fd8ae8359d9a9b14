"""Classifiers' heads against transformers' whole classifiers, on tiny seeded models of each kind of problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.manifest import ManifestError, ModelFile, StageSpec, TensorSpec
from services.dataplane.wire import Array
from services.stage.processors import Processor, open_processor
from tests.services.stage.processors.theirs import transformers

TOLERANCE = 2e-6
WIDTH, CLASSES = 32, 3
NAMES = ["schlecht", "mittel", "gut 🌳"]
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99,
    "max_position_embeddings": 16, "num_labels": CLASSES, "pad_token_id": 1,
}  # fmt: skip


def open_with(directory: Path, weights: dict[str, Any], *, width: int = WIDTH, **parameters: Any) -> Processor:
    np.savez(directory / "label.npz", **weights)
    spec = StageSpec(
        name="label",
        tier="light",
        processor="label",
        inputs=(TensorSpec(name="last_hidden_state", datatype="FP32", shape=("batch", "seq", width)),),
        outputs=(
            TensorSpec(name="logits", datatype="FP32", shape=("batch", CLASSES)),
            TensorSpec(name="scores", datatype="FP32", shape=("batch", CLASSES)),
            TensorSpec(name="label", datatype="BYTES", shape=("batch",)),
        ),
        files={"float32": (ModelFile(path="label.npz", sha256="0" * 64, size_bytes=0),)},
        parameters={"activation": "tanh", "id2label": NAMES, "problem": "single_label_classification"} | parameters,
    )
    return open_processor(spec, (directory / "label.npz",), 1)


def layers(first: Any, second: Any) -> dict[str, Array]:
    tensors = {"w1": first.weight.T, "b1": first.bias, "w2": second.weight.T, "b2": second.bias}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, initializer_range=0.5)).eval()


@pytest.fixture(scope="module")
def weights(bert: Any) -> dict[str, Array]:
    return layers(bert.bert.pooler.dense, bert.classifier)


IDS = torch.randint(3, 99, (4, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("problem", "scores_of"),
    [
        ("single_label_classification", lambda logits: logits.softmax(dim=1)),
        ("multi_label_classification", lambda logits: logits.sigmoid()),
        ("regression", lambda logits: logits),
    ],
)
def test_logits_scores_and_label_are_berts(
    problem: str, scores_of: Any, bert: Any, weights: dict[str, Array], tmp_path: Path
) -> None:
    with torch.no_grad():
        states = bert.bert(input_ids=IDS).last_hidden_state
        logits = bert(input_ids=IDS).logits
    outputs = open_with(tmp_path, weights, problem=problem).run({"last_hidden_state": states.numpy()})
    assert np.abs(outputs["logits"] - logits.numpy()).max() <= TOLERANCE
    assert np.abs(outputs["scores"] - scores_of(logits).numpy()).max() <= TOLERANCE
    assert {outputs[name].dtype for name in ("logits", "scores")} == {np.dtype(np.float32)}
    assert [label.decode() for label in outputs["label"]] == [NAMES[n] for n in logits.argmax(dim=1)]
    assert len({*outputs["label"]}) > 1, "a head that always says the same would pass"


def test_robertas_head_is_the_same_two_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    roberta = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SHAPE, initializer_range=0.5)).eval()
    with torch.no_grad():
        states = roberta.roberta(input_ids=IDS).last_hidden_state
        logits = roberta(input_ids=IDS).logits
    label = open_with(tmp_path, layers(roberta.classifier.dense, roberta.classifier.out_proj))
    assert np.abs(label.run({"last_hidden_state": states.numpy()})["logits"] - logits.numpy()).max() <= TOLERANCE


def test_one_layer_is_enough(tmp_path: Path) -> None:
    w1 = np.eye(WIDTH, CLASSES, dtype=np.float32)
    states = np.zeros((1, 2, WIDTH), np.float32)
    states[0, 0, :3] = [1, 5, 2]
    states[0, 1] = 99  # no token but the first counts
    outputs = open_with(tmp_path, {"w1": w1}, activation=None).run({"last_hidden_state": states})
    assert outputs["logits"].tolist() == [[1, 5, 2]]
    assert outputs["label"].tolist() == [b"mittel"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"problem": "ranking"}, "problem 'ranking' is not one of single_label_classification, multi_label"),
        ({"id2label": ["a", "b"]}, r"label\.npz leads from 32 numbers to 3 classes, not from 32 to 2"),
        ({"width": 48}, "not from 48 to 3"),
        ({"activation": "swishier"}, "activation 'swishier' is not one of"),
    ],
)
def test_a_head_that_does_not_fit_does_not_open(
    parameters: dict[str, Any], message: str, weights: dict[str, Array], tmp_path: Path
) -> None:
    with pytest.raises(ManifestError, match=message):
        open_with(tmp_path, weights, **parameters)


def test_it_says_what_the_scores_are_of(weights: dict[str, Array], tmp_path: Path) -> None:
    label = open_with(tmp_path, weights)
    assert label.inline
    assert label.describe() == {"labels": NAMES, "problem": "single_label_classification"}
