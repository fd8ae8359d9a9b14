"""Opening a stage's graph: a sound one runs, a bad one is refused at start with the reason, and others of its model serve."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models import manifest
from models.manifest import Manifest, StageSpec, TensorSpec
from services.dataplane.errors import BadRequest
from services.stage.processors import open_processor

REPOSITORY = Path(__file__).resolve().parents[3]
WIDTH = 40
"""A weight of 40 x 40 numbers is large enough to lie outside the graph's file."""
GRAPH, DATA = "scale.float32.onnx", "scale.float32.onnx.data"
X, Y = (TensorSpec(name=name, datatype="FP32", shape=("batch", WIDTH)) for name in ("hidden", "hidden"))


def _write_graph(directory: Path, opset: int = 23, ir: int = 10, output: str = "hidden_out") -> None:
    weight = numpy_helper.from_array(2 * np.eye(WIDTH, dtype=np.float32), "weight")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("hidden", output)]
    node = helper.make_node("MatMul", ["hidden", "weight"], [output])
    graph = helper.make_graph([node], "scale", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    (directory / DATA).unlink(missing_ok=True)  # onnx appends
    onnx.save(model, directory / GRAPH, save_as_external_data=True, location=DATA, size_threshold=100)


def _write_manifest(directory: Path, **changes: object) -> StageSpec:
    """Describe the files as they are, so that only opening them can find what is wrong with them."""
    files = tuple(manifest.describe(directory / name, directory) for name in (GRAPH, DATA) if (directory / name).exists())
    spec = StageSpec(name="scale", tier="core", processor="onnx", inputs=(X,), outputs=(Y,), files={"float32": files})
    spec = spec.model_copy(update=changes)
    echo = StageSpec(name="echo", tier="light", processor="echo", inputs=(X,), outputs=(Y,), files={"float32": ()})
    model = Manifest(model="tiny", source="tiny@1", architecture="None", weights="seeded", stages=(spec, echo))
    manifest.save(model, directory)
    return spec


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model of one graph with its weights beside it, and a light stage."""
    _write_graph(tmp_path)
    _write_manifest(tmp_path)
    return tmp_path


def test_a_sound_graph_runs_and_outputs_are_named_as_the_manifest_does(directory: Path) -> None:
    spec = _write_manifest(directory)
    found = open_processor(spec, manifest.check_files(spec, "float32", directory), threads=1)
    x = np.ones((2, WIDTH), np.float32)
    assert np.array_equal(found.run({"hidden": x})["hidden"], 2 * x)
    assert found.describe()["threads"] == 1


def test_values_out_of_range_are_refused(directory: Path) -> None:
    spec = _write_manifest(directory, parameters={"range": {"hidden": [0, 9]}})
    found = open_processor(spec, manifest.check_files(spec, "float32", directory), threads=1)
    with pytest.raises(BadRequest, match="hidden must be between 0 and 9"):
        found.run({"hidden": np.full((1, WIDTH), 10, np.float32)})


def _truncated(directory: Path) -> None:
    (directory / GRAPH).write_bytes((directory / GRAPH).read_bytes()[:-10])


def _other_bytes(directory: Path) -> None:
    content = bytearray((directory / DATA).read_bytes())
    content[0] ^= 1
    (directory / DATA).write_bytes(content)


def _no_weights(directory: Path) -> None:
    (directory / DATA).unlink()


def _no_weights_and_not_listed(directory: Path) -> None:
    (directory / DATA).unlink()
    _write_manifest(directory)


def _weights_too_short(directory: Path) -> None:
    (directory / DATA).write_bytes((directory / DATA).read_bytes()[:100])
    _write_manifest(directory)


def _no_graph(directory: Path) -> None:
    (directory / GRAPH).write_bytes(b"not a graph")
    _write_manifest(directory)


def _newer_opset(directory: Path) -> None:
    _write_graph(directory, opset=99)
    _write_manifest(directory)


def _newer_format(directory: Path) -> None:
    _write_graph(directory, ir=99)
    _write_manifest(directory)


def _other_inputs(directory: Path) -> None:
    _write_manifest(directory, inputs=(TensorSpec(name="pixels", datatype="FP32", shape=("batch", WIDTH)),))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_truncated, r"scale\.float32\.onnx: \d+ bytes where the manifest says \d+"),
        (_other_bytes, r"scale\.float32\.onnx\.data: sha256 differs"),
        (_no_weights, r"scale\.float32\.onnx\.data: missing"),
        (_no_weights_and_not_listed, r"scale\.float32\.onnx: ONNX Runtime cannot open it .*scale\.float32\.onnx\.data"),
        (_weights_too_short, r"scale\.float32\.onnx: ONNX Runtime cannot open it .*"),
        (_no_graph, r"scale\.float32\.onnx: ONNX Runtime cannot open it .*export the model again"),
        (_newer_opset, r"cannot open it .*till opset \d+.*export the model with a lower --opset, or update ONNX Runtime"),
        (_newer_format, r"cannot open it .*max supported IR version.*export the model with a lower --opset"),
        (_other_inputs, r"takes \['hidden'\], not \['pixels'\] as the manifest says"),
    ],
)
def test_a_bad_model_is_refused_at_start_with_the_reason(spoil: Callable[[Path], None], reason: str, directory: Path) -> None:
    spoil(directory)
    model = manifest.load(directory)
    spec = model.stage("scale")
    with pytest.raises(manifest.ManifestError, match=f"(?s){reason}"):
        open_processor(spec, manifest.check_files(spec, "float32", directory), threads=1)
    echo = model.stage("echo")
    assert open_processor(echo, manifest.check_files(echo, "float32", directory), threads=1).inline is not None


def test_a_stage_that_is_refused_ends_with_status_3_and_one_line(directory: Path) -> None:
    _no_weights(directory)
    command = [sys.executable, "-m", "services.stage", "--model", str(directory), "--stage", "scale"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines() == [
        f"espalier stage: {directory / DATA}: missing; export the model again (espalier export)"
    ]
