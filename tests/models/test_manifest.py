"""The manifest as a document: what it accepts, what it refuses, and that it survives the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.manifest import (
    MANIFEST_NAME,
    Manifest,
    ManifestError,
    ModelFile,
    ServiceLaw,
    ServicePoint,
    StageProfile,
    StageSpec,
    TensorSpec,
    check_files,
    describe,
    load,
    save,
)

_names = st.from_regex(r"[a-z][a-z0-9_-]{0,20}", fullmatch=True)
_seconds = st.floats(min_value=1e-9, max_value=1e6)
_axes = st.one_of(st.integers(1, 4096), st.sampled_from(["batch", "seq", "labels"]))
_tensors = st.builds(
    TensorSpec,
    name=_names,
    datatype=st.sampled_from(["FP32", "INT64", "BYTES"]),
    shape=st.lists(_axes, max_size=4).map(tuple),
    pad_value=st.floats(allow_nan=False, allow_infinity=False),
    bytes_per_item=st.integers(0, 1 << 40),
)
_files = st.builds(
    ModelFile, path=_names, sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True), size_bytes=st.integers(0, 1 << 40)
)
_points = st.builds(
    ServicePoint,
    batch=st.integers(1, 64),
    length=st.integers(1, 512),
    samples=st.integers(1, 1000),
    mean_s=_seconds,
    std_s=_seconds,
    p50_s=_seconds,
    p95_s=_seconds,
    p99_s=_seconds,
)
_profiles = st.builds(
    StageProfile,
    points=st.lists(_points, min_size=1, max_size=3).map(tuple),
    law=st.builds(ServiceLaw, base_s=_seconds, per_unit_s=_seconds, tail_ratio=st.floats(1, 100)),
    resident_bytes=st.integers(0, 1 << 40),
    load_s=_seconds,
    threads=st.integers(1, 64),
    cpu=st.text(max_size=20),
)
_stages = st.builds(
    StageSpec,
    name=_names,
    tier=st.sampled_from(["core", "light"]),
    processor=_names,
    inputs=st.lists(_tensors, min_size=1, max_size=3, unique_by=lambda t: t.name).map(tuple),
    outputs=st.lists(_tensors, min_size=1, max_size=3, unique_by=lambda t: t.name).map(tuple),
    files=st.dictionaries(st.sampled_from(["float32", "int8"]), st.lists(_files, max_size=2).map(tuple)),
    parameters=st.dictionaries(_names, st.one_of(st.booleans(), st.integers(-10, 10), st.text(max_size=5)), max_size=3),
    profile=st.dictionaries(st.sampled_from(["float32", "int8"]), _profiles),
)
_manifests = st.builds(
    Manifest,
    model=_names,
    source=st.text(max_size=20),
    architecture=st.text(max_size=20),
    weights=st.sampled_from(["trained", "seeded"]),
    typical_length=st.dictionaries(_names, st.integers(1, 512), max_size=2),
    tolerances=st.dictionaries(st.sampled_from(["float32", "int8"]), _seconds),
    stages=st.lists(_stages, min_size=1, max_size=3, unique_by=lambda s: s.name).map(tuple),
)


def _stage(**changes: Any) -> StageSpec:
    tensor = TensorSpec(name="x", datatype="FP32", shape=("batch", 4))
    return StageSpec(
        **{"name": "double", "tier": "light", "processor": "double", "inputs": (tensor,), "outputs": (tensor,), **changes}
    )


def _manifest(*stages: StageSpec) -> Manifest:
    return Manifest(model="tiny", source="test", architecture="None", weights="seeded", stages=stages or (_stage(),))


@given(manifest=_manifests)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
def test_a_manifest_survives_the_disk(manifest: Manifest, tmp_path: Path) -> None:
    save(manifest, tmp_path)
    assert load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_a_missing_manifest_says_export_first(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="export the model first"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("format_version", 2, "format_version"),
        ("stages", [], "stages"),
        ("weights", "guessed", "weights"),
        ("model", "Not A Name", "model"),
        ("surprise", 1, "surprise"),
        ("tolerances", {"float8": 1.0}, "tolerances"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, complaint: str, tmp_path: Path) -> None:
    document = json.loads(save(_manifest(), tmp_path).read_text())
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**document, field: value}))
    with pytest.raises(ManifestError, match=complaint):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_half_a_manifest_is_refused(keep: int, tmp_path: Path) -> None:
    path = save(_manifest(), tmp_path)
    path.write_bytes(path.read_bytes().rstrip()[:keep])
    with pytest.raises(ManifestError, match="export the model again"):
        load(tmp_path)


def test_names_are_unique() -> None:
    with pytest.raises(ValidationError, match="two stages have the same name"):
        _manifest(_stage(), _stage())
    tensor = TensorSpec(name="x", datatype="FP32", shape=("batch",))
    with pytest.raises(ValidationError, match="two inputs of the same name"):
        _stage(inputs=(tensor, tensor))


def test_batching_needs_a_batch_axis_everywhere() -> None:
    with pytest.raises(ValidationError, match="without a batch axis"):
        _stage(max_batch=4, inputs=(TensorSpec(name="x", datatype="FP32", shape=(4,)),))


def test_units_count_symbolic_axes_of_the_first_input() -> None:
    tensor = TensorSpec(name="hidden", datatype="FP32", shape=("batch", "seq", 384))
    assert _stage(inputs=(tensor,)).units((3, 10, 384)) == 30
    assert tensor.batch_axis == 0


def test_the_law_is_a_line_with_a_tail() -> None:
    law = ServiceLaw(base_s=0.002, per_unit_s=0.001, tail_ratio=1.5)
    assert law.mean_s(8) == pytest.approx(0.010)
    assert law.tail_s(8) == pytest.approx(0.015)


def test_an_unknown_stage_is_refused_with_those_there_are() -> None:
    with pytest.raises(ManifestError, match="it has double"):
        _manifest().stage("triple")


@pytest.fixture
def served(tmp_path: Path) -> tuple[StageSpec, Path]:
    """A stage with one file."""
    (tmp_path / "weights.bin").write_bytes(b"0123456789")
    return _stage(files={"float32": (describe(tmp_path / "weights.bin", tmp_path),)}), tmp_path


def test_good_files_are_found(served: tuple[StageSpec, Path]) -> None:
    stage, directory = served
    assert check_files(stage, "float32", directory) == (directory / "weights.bin",)
    moved = directory / "moved"
    moved.mkdir()
    shutil.move(directory / "weights.bin", moved)
    assert check_files(stage, "float32", moved) == (moved / "weights.bin",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "missing"), (b"012345678", "9 bytes where"), (b"012345678x", "sha256 differs"), (b"", "0 bytes")],
)
def test_bad_files_are_refused(content: bytes | None, complaint: str, served: tuple[StageSpec, Path]) -> None:
    stage, directory = served
    path = directory / "weights.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ManifestError, match=complaint):
        check_files(stage, "float32", directory)


def test_a_precision_that_was_not_exported_is_refused(served: tuple[StageSpec, Path]) -> None:
    stage, directory = served
    with pytest.raises(ManifestError, match="not exported as int8; it has float32"):
        check_files(stage, "int8", directory)
