"""Text classifiers: each family's head as a stage, whole and cut, in every precision; and that spoiling is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from models.export import PRECISIONS, Exported, Wanted, export
from models.verification import verify
from tests.models import tiny
from tests.models.verification.test_sentence import missed, reseal


@pytest.fixture(scope="session")
def classifier(seeded_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """classifier-ci in every precision and three parts; not to be changed."""
    del seeded_root
    out = tmp_path_factory.mktemp("exports") / "classifier-ci"
    return export("classifier-ci", out, Wanted(precisions=PRECISIONS, parts=3))


def test_the_stages_are_the_contract_with_the_services(classifier: Exported) -> None:
    manifest = classifier.manifest
    assert (manifest.family, manifest.architecture) == ("bert-classifier", "BertForSequenceClassification")
    assert [stage.name for stage in manifest.stages] == ["tokenise", "encode-1", "encode-2", "encode-3", "label"]
    label = manifest.stage("label")
    assert [(tensor.name, tensor.shape) for tensor in (*label.inputs, *label.outputs)] == [
        ("last_hidden_state", ("batch", "seq", 64)),
        ("logits", ("batch", 3)),
        ("scores", ("batch", 3)),
        ("label", ("batch",)),
    ]
    assert label.parameters == {
        "activation": "tanh",
        "id2label": ["negative", "neutral", "positive"],
        "problem": "single_label_classification",
    }


def test_parts_in_every_precision_equal_the_model(classifier: Exported) -> None:
    verdict = verify(classifier.directory, "classifier-ci")
    assert missed(verdict) == set()
    assert {figure.precision for figure in verdict.figures} == set(PRECISIONS)


@pytest.mark.parametrize(
    ("family", "architecture", "activation", "labels", "problem"),
    [
        ("roberta", "RobertaForSequenceClassification", "tanh", 4, "single_label_classification"),
        ("distilbert", "DistilBertForSequenceClassification", "relu", 1, "multi_label_classification"),
    ],
)
def test_heads_of_other_families(
    family: str, architecture: str, activation: str, labels: int, problem: str, tmp_path: Path
) -> None:
    checkpoint = tiny.build(tmp_path / "checkpoint", family, labels=labels)
    manifest = export(str(checkpoint), tmp_path / "export", Wanted(weights="seeded")).manifest
    parameters = manifest.stage("label").parameters
    assert (manifest.architecture, parameters["activation"], parameters["problem"]) == (architecture, activation, problem)
    assert missed(verify(tmp_path / "export", str(checkpoint))) == set()


def test_a_spoilt_head_is_found(classifier: Exported, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(classifier.directory, tmp_path / "export"))
    with np.load(spoilt / "label.npz", allow_pickle=False) as head:
        arrays = dict(head) | {"b2": head["b2"] + np.float32(0.001)}
    np.savez(spoilt / "label.npz", allow_pickle=False, **arrays)
    reseal(spoilt)
    assert missed(verify(spoilt, "classifier-ci")) == {("float32", "logits")}
