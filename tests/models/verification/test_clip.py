"""CLIP: what is exported, that it equals the model whole and cut, and that spoiling is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.errors import CheckpointError
from models.export import PRECISIONS, Exported, Wanted, export
from models.manifest import Manifest
from models.verification import verify
from models.verification.clip import images
from tests.models import tiny
from tests.models.verification.test_sentence import missed, reseal, spoil_weights

SHAPE = ("batch", 17, 64)


@pytest.fixture(scope="session")
def clip(seeded_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """clip-tiny in every precision; not to be changed."""
    del seeded_root
    return export("clip-tiny", tmp_path_factory.mktemp("exports") / "clip-tiny", Wanted(precisions=PRECISIONS))


@pytest.fixture
def copy(clip: Exported, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(clip.directory, tmp_path / "export"))


def _tensors(manifest: Manifest, name: str) -> list[tuple[str, str, tuple[int | str, ...]]]:
    stage = manifest.stage(name)
    return [(tensor.name, tensor.datatype, tensor.shape) for tensor in (*stage.inputs, *stage.outputs)]


def test_the_stages_are_the_contract_with_the_services(clip: Exported) -> None:
    manifest = clip.manifest
    assert (manifest.family, manifest.architecture, manifest.weights) == ("clip", "CLIPModel", "seeded")
    assert {stage.name: (stage.tier, stage.processor) for stage in manifest.stages} == {
        "preprocess": ("light", "image"),
        "vision": ("core", "onnx"),
        "image_head": ("light", "project"),
        "tokenise": ("light", "tokenise"),
        "text": ("core", "onnx"),
        "text_head": ("light", "project"),
        "match": ("light", "match"),
    }
    pixels, states = ("pixel_values", "FP32", ("batch", 3, 32, 32)), ("last_hidden_state", "FP32", SHAPE)
    assert _tensors(manifest, "preprocess") == [("image", "BYTES", ("batch",)), pixels]
    assert _tensors(manifest, "vision") == [pixels, states]
    assert _tensors(manifest, "image_head") == [states, ("image_embedding", "FP32", ("batch", 32))]
    ids, mask = ("input_ids", "INT64", ("batch", "seq")), ("attention_mask", "INT64", ("batch", "seq"))
    read = ("last_hidden_state", "FP32", ("batch", "seq", 64))
    assert _tensors(manifest, "text") == [ids, mask, read]
    assert _tensors(manifest, "text_head") == [read, ids, ("text_embedding", "FP32", ("batch", 32))]
    assert _tensors(manifest, "match") == [
        ("image_embedding", "FP32", ("batch", 32)),
        ("label_embeddings", "FP32", ("labels", 32)),
        ("labels", "BYTES", ("labels",)),
        ("scores", "FP32", ("batch", "labels")),
        ("label", "BYTES", ("batch",)),
    ]
    assert manifest.stage("text_head").parameters["eos_id"] == 1
    assert manifest.stage("match").parameters["scale"] == pytest.approx(14.28, abs=0.01)
    with np.load(clip.directory / "image_head.npz", allow_pickle=False) as head:
        assert {name: array.shape for name, array in head.items()} == {"ln_weight": (64,), "ln_bias": (64,), "w1": (64, 32)}


def test_every_precision_equals_the_model(clip: Exported) -> None:
    verdict = verify(clip.directory, "clip-tiny")
    assert missed(verdict) == set()
    assert {figure.precision for figure in verdict.figures} == set(PRECISIONS)
    worst = {(figure.precision, figure.what): figure.value for figure in verdict.figures}
    assert worst["int8", "image embedding, 1 - cosine"] > 1e-6  # it is a quantised model that was compared


def test_so_do_its_parts(clip: Exported, tmp_path: Path) -> None:
    del clip  # the checkpoint is built by then
    cut = export("clip-tiny", tmp_path, Wanted(parts=2))
    assert [stage.name for stage in cut.manifest.parts("vision")] == ["vision-1", "vision-2"]
    assert _tensors(cut.manifest, "vision-2")[0] == ("hidden", "FP32", SHAPE)
    assert _tensors(cut.manifest, "text-1")[-1] == ("hidden", "FP32", ("batch", "seq", 64))
    assert missed(verify(tmp_path, "clip-tiny")) == set()


def _other_head(directory: Path) -> None:
    with np.load(directory / "text_head.npz", allow_pickle=False) as head:
        arrays = {name: array * np.linspace(1, 1.01, array.shape[-1], dtype=np.float32) for name, array in head.items()}
    np.savez(directory / "text_head.npz", allow_pickle=False, **arrays)


@pytest.mark.parametrize(
    ("spoil", "parameters", "found"),
    [
        (lambda out: spoil_weights(out, "vision"), {}, {"states of vision", "image embedding"}),
        (lambda out: spoil_weights(out, "text"), {}, {"states of text", "text embedding"}),
        (_other_head, {}, {"text embedding"}),
        (lambda _: None, {"text_head": {"eos_id": 5}}, {"text embedding"}),
        (lambda _: None, {"match": {"scale": 15.0}}, {"scores of labels"}),
    ],
    ids=["vision", "text", "head", "end of text", "scale"],
)
def test_a_spoilt_export_is_found(
    spoil: Callable[[Path], None], parameters: dict[str, dict[str, object]], found: set[str], copy: Path
) -> None:
    spoil(copy)
    reseal(copy, **parameters)
    assert found <= {what for precision, what in missed(verify(copy, "clip-tiny")) if precision == "float32"}


def test_another_model_is_refused(clip: Exported, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "bert")
    with pytest.raises(CheckpointError):
        verify(clip.directory, str(other))


def test_pictures_are_odd_and_seeded() -> None:
    batches = images([3, 32, 32], np.random.default_rng(0))
    assert {batch.shape[1:] for batch in batches} == {(3, 32, 32)}
    assert {len(batch) for batch in batches} >= {1, 5}
    assert max(float(np.abs(batch).max()) for batch in batches) > 10
    assert any(float(np.ptp(batch)) == 0 for batch in batches)
    again = images([3, 32, 32], np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
