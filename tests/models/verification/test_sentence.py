"""Verifying: an honest export passes, and every way of spoiling one is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from models import manifest
from models.checkpoint import load_tokenizer, resolve
from models.errors import CheckpointError, StageBroken
from models.export import PRECISIONS, Exported, Wanted, export
from models.manifest import Manifest, ManifestError, describe, load, save
from models.verification import verify
from models.verification.figures import Figure, Verdict
from models.verification.texts import batches
from tests.models import tiny
from tests.models.conftest import Made, edit


def missed(verdict: Verdict) -> set[tuple[str, str]]:
    """Precision and measure of the figures that are not ok."""
    return {(figure.precision, figure.what.partition(",")[0]) for figure in verdict.figures if not figure.ok}


def reseal(directory: Path, **parameters: dict[str, object]) -> Manifest:
    """Rewrite the manifest's checksums, and parameters by stage, so that only the comparison itself can find the spoiling."""
    manifest = load(directory)
    stages = []
    for stage in manifest.stages:
        files = {p: tuple(describe(directory / file.path, directory) for file in files) for p, files in stage.files.items()}
        changed = {**stage.parameters, **parameters.get(stage.name, {})}
        stages.append(stage.model_copy(update={"files": files, "parameters": changed}))
    resealed = manifest.model_copy(update={"stages": tuple(stages)})
    save(resealed, directory)
    return resealed


def test_the_tiny_export_equals_its_model(tiny_bert: Path, tiny_export: Exported) -> None:
    verdict = verify(tiny_export.directory, str(tiny_bert))
    assert missed(verdict) == set()
    assert verdict.ok
    assert verdict.reference == tiny_export.manifest.source
    worst = {(figure.precision, figure.what): figure.value for figure in verdict.figures}
    assert worst["int8", "embedding, 1 - cosine"] > 1e-6  # it is a quantised model that was compared


@pytest.mark.timeout(300)  # on a fresh clone this makes the export that `make demo` will use
def test_minilm_equals_its_model(minilm: Path) -> None:
    verdict = verify(minilm, "minilm")
    assert missed(verdict) == set()
    assert manifest.load(minilm).tolerances["float32"] == 1e-4


@pytest.mark.parametrize(
    ("family", "architecture", "opset", "mode", "normalise"),
    [
        ("roberta", "RobertaModel", 23, "pooling_mode_cls_token", True),
        ("xlm-roberta", "XLMRobertaModel", 20, "pooling_mode_mean_tokens", False),
    ],
)
def test_other_families_opsets_and_poolings(
    family: str, architecture: str, opset: int, mode: str, normalise: bool, tmp_path: Path
) -> None:
    checkpoint = tiny.build(tmp_path / "checkpoint", family)
    tiny.add_sentence_settings(checkpoint, mode=mode, normalise=normalise, max_tokens=500)
    exported = export(str(checkpoint), tmp_path / "export", Wanted(opset=opset, weights="seeded"))
    assert exported.manifest.architecture == architecture
    # RoBERTa's positions begin after its padding id, 1.
    assert exported.manifest.stage("tokenise").parameters == {"max_tokens": tiny.POSITIONS - 2, "pad_id": 1, "truncate": False}
    assert missed(verify(tmp_path / "export", str(checkpoint))) == set()


def spoil_weights(directory: Path, stage: str = "encode") -> None:
    """Make the largest matrix 1 % larger."""
    graph = onnx.load(directory / f"{stage}.float32.onnx", load_external_data=False).graph
    places = [{entry.key: entry.value for entry in each.external_data} for each in graph.initializer if each.data_type == 1]
    largest = max((place for place in places if place), key=lambda place: int(place["length"]))
    count = int(largest["length"]) // 4
    weights = np.memmap(directory / largest["location"], np.float32, "r+", offset=int(largest["offset"]), shape=(count,))
    weights *= np.float32(1.01)
    weights.flush()


def _spoil_tokenizer(directory: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(directory / "tokenizer.json", truncation=truncation)


EVERY = {(precision, "embedding") for precision in PRECISIONS}
TOKENS = {(precision, "batches whose tokens differ") for precision in PRECISIONS}


@pytest.mark.parametrize(
    ("spoil", "parameters", "found"),
    [
        (spoil_weights, {}, {("float32", "embedding"), ("float32", "hidden states")}),
        (_spoil_tokenizer, {}, EVERY | TOKENS),
        (lambda _: None, {"pool": {"mode": "cls"}}, EVERY),
        (lambda _: None, {"pool": {"normalise": False}}, {("float32", "embedding")}),
        (
            lambda _: None,
            {"tokenise": {"pad_id": 7}},
            TOKENS,
        ),
    ],
    ids=["weights", "tokenizer", "pooling mode", "normalisation", "padding"],
)
def test_a_spoilt_export_is_found_and_the_stage_named(
    spoil: Callable[[Path], None],
    parameters: dict[str, dict[str, object]],
    found: set[tuple[str, str]],
    tiny_bert: Path,
    exported_copy: Path,
) -> None:
    spoil(exported_copy)
    reseal(exported_copy, **parameters)
    assert missed(verify(exported_copy, str(tiny_bert))) == found


def test_a_changed_file_is_found_by_its_checksum(tiny_bert: Path, exported_copy: Path) -> None:
    spoil_weights(exported_copy)
    with pytest.raises(ManifestError, match="sha256 differs"):
        verify(exported_copy, str(tiny_bert))


def test_missing_weights_are_found_before_the_graph_is_opened(tiny_bert: Path, exported_copy: Path) -> None:
    (exported_copy / "encode.float32.onnx.data").unlink()
    with pytest.raises(ManifestError, match=r"encode\.float32\.onnx\.data: missing"):
        verify(exported_copy, str(tiny_bert))


def test_a_graph_of_a_newer_operator_set_is_refused(tiny_bert: Path, exported_copy: Path) -> None:
    path = exported_copy / "encode.float32.onnx"
    model = onnx.load(path, load_external_data=False)
    next(each for each in model.opset_import if not each.domain).version = 99
    path.write_bytes(model.SerializeToString())
    reseal(exported_copy)
    with pytest.raises(StageBroken, match="Opset 99"):
        verify(exported_copy, str(tiny_bert))


def test_a_file_that_is_no_model_is_refused(tiny_bert: Path, exported_copy: Path) -> None:
    (exported_copy / "encode.int8.onnx").write_bytes(b"not a model")
    reseal(exported_copy)
    with pytest.raises(StageBroken, match=r"encode\.int8\.onnx: cannot be opened"):
        verify(exported_copy, str(tiny_bert))


def test_two_parts_equal_the_model(tiny_bert: Path, tiny_cut: Made) -> None:
    cut = tiny_cut.exported
    assert [stage.name for stage in cut.manifest.parts("encode")] == ["encode-1", "encode-2"]
    assert missed(verify(cut.directory, str(tiny_bert))) == set()


def test_other_weights_of_the_same_shape_miss(tiny_export: Exported, tmp_path: Path) -> None:
    other = tiny.build(tmp_path / "tiny-bert", seed=1)
    verdict = verify(tiny_export.directory, str(other))
    assert not verdict.ok
    assert ("float32", "batches whose tokens differ") not in missed(verdict)
    assert verdict.reference != tiny_export.manifest.source


def test_a_model_of_another_width_is_refused(tiny_export: Exported) -> None:
    with pytest.raises(CheckpointError, match="width 384"):
        verify(tiny_export.directory, "minilm")


@pytest.mark.parametrize(
    ("value", "ok"), [(0.0, True), (1e-4, True), (1.1e-4, False), (float("nan"), False), (float("inf"), False)]
)
def test_a_figure_is_ok_only_within_its_tolerance(value: float, ok: bool) -> None:
    assert Figure("float32", "embedding", value, 0.0, 1e-4, 1).ok is ok


def test_texts_are_odd_mixed_seeded_and_within_the_limit(tiny_bert: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(tiny_bert)))
    texts = batches(tokenizer, 40, np.random.default_rng(0))
    lengths = [[len(tokenizer(text)["input_ids"]) for text in batch] for batch in texts]
    assert max(max(batch) for batch in lengths) == 40
    assert min(min(batch) for batch in lengths) == 2  # the empty text: two special tokens
    assert any(len(set(batch)) > 5 for batch in lengths)
    assert any("\u05dc" in text for batch in texts for text in batch)  # right to left
    assert texts == batches(tokenizer, 40, np.random.default_rng(0))
    assert texts != batches(tokenizer, 40, np.random.default_rng(1))
