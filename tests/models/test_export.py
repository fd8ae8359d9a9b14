"""Exporting: what is written, when it is written again, and what a reader finds when it goes wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import directory
from models.adapters.piece import Cut, Piece
from models.checkpoint import resolve
from models.errors import CheckpointError, ExportFailed, NotEnoughSpace, UnsupportedCheckpoint
from models.export import Exported, Wanted, Writer, export, exported_precisions, needed_bytes, unchanged
from models.manifest import MANIFEST_NAME, ManifestError, StageSpec, TensorSpec, check_files, load, save
from tests.models import tiny
from tests.models.conftest import EVERY, Made

_X = TensorSpec(name="x", datatype="FP32", shape=("batch", 3))
REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_stages_are_the_contract_with_the_services(tiny_export: Exported) -> None:
    hidden = tiny.HIDDEN
    assert {
        stage.name: (
            stage.tier,
            stage.processor,
            [(tensor.name, tensor.datatype, tensor.shape) for tensor in stage.inputs],
            [(tensor.name, tensor.datatype, tensor.shape) for tensor in stage.outputs],
        )
        for stage in tiny_export.manifest.stages
    } == {
        "tokenise": (
            "light",
            "tokenise",
            [("text", "BYTES", ("batch",))],
            [
                ("input_ids", "INT64", ("batch", "seq")),
                ("attention_mask", "INT64", ("batch", "seq")),
                ("token_count", "INT64", ("batch",)),
            ],
        ),
        "encode": (
            "core",
            "onnx",
            [("input_ids", "INT64", ("batch", "seq")), ("attention_mask", "INT64", ("batch", "seq"))],
            [("last_hidden_state", "FP32", ("batch", "seq", hidden))],
        ),
        "pool": (
            "light",
            "pool",
            [("last_hidden_state", "FP32", ("batch", "seq", hidden)), ("attention_mask", "INT64", ("batch", "seq"))],
            [("embedding", "FP32", ("batch", hidden))],
        ),
        "classify": (
            "light",
            "classify",
            [
                ("embedding", "FP32", ("batch", hidden)),
                ("label_embeddings", "FP32", ("labels", hidden)),
                ("labels", "BYTES", ("labels",)),
            ],
            [("scores", "FP32", ("batch", "labels")), ("label", "BYTES", ("batch",))],
        ),
        "rank": (
            "light",
            "rank",
            [("query_embedding", "FP32", ("queries", hidden)), ("document_embeddings", "FP32", ("documents", hidden))],
            [("scores", "FP32", ("queries", "documents")), ("order", "INT64", ("queries", "documents"))],
        ),
    }


def test_files_parameters_and_sizes(tiny_export: Exported) -> None:
    manifest = load(tiny_export.directory)
    assert manifest == tiny_export.manifest
    assert (manifest.model, manifest.architecture, manifest.weights) == ("tiny-bert", "BertModel", "seeded")
    assert manifest.versions["opset"] == "23"
    tokenise, encode = manifest.stage("tokenise"), manifest.stage("encode")
    assert tokenise.parameters == {"max_tokens": tiny.POSITIONS, "pad_id": 0, "truncate": False}
    assert manifest.stage("pool").parameters == {"mode": "mean", "normalise": True}
    assert [path.name for path in check_files(tokenise, "float32", tiny_export.directory)] == ["tokenizer.json"]
    assert check_files(encode, "float32", tiny_export.directory)[0].name == "encode.float32.onnx"
    assert check_files(encode, "int8", tiny_export.directory)[0].name == "encode.int8.onnx"
    assert check_files(manifest.stage("pool"), "float32", tiny_export.directory) == ()
    assert encode.max_batch == 16
    assert encode.outputs[0].bytes_per_item == 48 * tiny.HIDDEN * 4
    assert all(tensor.bytes_per_item > 0 for stage in manifest.stages for tensor in (*stage.inputs, *stage.outputs))
    listed = {file.path for stage in manifest.stages for files in stage.files.values() for file in files}
    assert {path.name for path in tiny_export.directory.iterdir()} == listed | {MANIFEST_NAME, ".lock"}


def test_the_tokenizer_neither_pads_nor_truncates(tiny_bert: Path, tiny_export: Exported) -> None:
    before = json.loads((tiny_bert / "tokenizer.json").read_text())
    assert before["padding"] is not None  # else this test shows nothing
    assert before["truncation"] is not None
    after = json.loads((tiny_export.directory / "tokenizer.json").read_text())
    assert (after["padding"], after["truncation"]) == (None, None)


def test_up_to_date_is_found_without_torch(tiny_bert: Path, tiny_export: Exported) -> None:
    code = (
        "import sys; from pathlib import Path; from models.export import Wanted, export\n"
        "wanted = Wanted(precisions=('int8',), weights='seeded')\n"
        "assert not export(sys.argv[1], Path(sys.argv[2]), wanted).written\n"
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tiny_bert, tiny_export.directory], cwd=REPOSITORY, check=True)


def _other_opset(_: Path) -> Wanted:
    return Wanted(opset=20, weights="seeded")


def _other_parts(_: Path) -> Wanted:
    return Wanted(parts=2, weights="seeded")


def _other_label(_: Path) -> Wanted:
    return Wanted(weights="trained")


def _other_library(out: Path) -> Wanted:
    manifest = load(out)
    save(manifest.model_copy(update={"versions": {**manifest.versions, "torch": "1.0"}}), out)
    return EVERY


def _truncated_file(out: Path) -> Wanted:
    path = out / "encode.int8.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    return EVERY


def _missing_manifest(out: Path) -> Wanted:
    (out / MANIFEST_NAME).unlink()
    return EVERY


@pytest.mark.parametrize(
    "change", [_other_opset, _other_parts, _other_label, _other_library, _truncated_file, _missing_manifest]
)
def test_what_makes_an_export_stale(change: Any, tiny_bert: Path, exported_copy: Path) -> None:
    checkpoint = resolve(str(tiny_bert))
    assert unchanged(exported_copy, checkpoint, EVERY) is not None
    assert unchanged(exported_copy, checkpoint, change(exported_copy)) is None


def test_another_checkpoint_of_the_same_name_makes_it_stale(tiny_bert: Path, exported_copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_bert, tmp_path / "other" / tiny_bert.name))
    assert unchanged(exported_copy, resolve(str(other)), EVERY) is not None
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    assert unchanged(exported_copy, resolve(str(other)), EVERY) is None


def test_int8_alone_keeps_no_float32_and_asking_for_more_takes_nothing_away(tiny_bert: Path, tmp_path: Path) -> None:
    first = export(str(tiny_bert), tmp_path, Wanted(precisions=("int8",)))
    assert exported_precisions(first.manifest) == {"int8"}
    assert not (tmp_path / "encode.float32.onnx").exists()
    second = export(str(tiny_bert), tmp_path, Wanted(precisions=("float32",)))
    assert second.written
    assert exported_precisions(second.manifest) == {"int8", "float32"}


def test_every_graph_made_is_counted(tiny_cut: Made) -> None:
    assert tiny_cut.told == [(i, 4) for i in range(5)]  # two parts in two precisions


def test_a_precision_without_a_tolerance_is_refused(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.adapters.bert.TOLERANCES", {"float32": 1e-4})
    with pytest.raises(UnsupportedCheckpoint, match="bert has no stages in int8; supported: float32"):
        export(str(tiny_bert), tmp_path, Wanted(precisions=("int8",)))


def test_arrays_become_files_that_need_no_pickle(tmp_path: Path) -> None:
    table, heads = np.arange(6, dtype=np.float32).reshape(2, 3), {"w1": np.ones((3, 2)), "b1": np.zeros(2)}
    spec = StageSpec(name="head", tier="light", processor="project", inputs=(_X,), outputs=(_X,))
    piece = Piece(spec, assets={"head-table.npy": table, "head.npz": heads, "head.txt": b"text"})
    cut = Cut("None", "none", (piece,), {}, {}, {"float32": 0.0})
    (stage,) = Writer(cut, ("int8",), 23, tmp_path, lambda _: None, lambda _, __: None).stages()
    assert [file.path for file in stage.files["float32"]] == ["head-table.npy", "head.npz", "head.txt"]
    assert np.array_equal(np.load(tmp_path / "head-table.npy", mmap_mode="r", allow_pickle=False), table)
    with np.load(tmp_path / "head.npz", allow_pickle=False) as found:
        assert all(np.array_equal(found[name], array) for name, array in heads.items())
    assert check_files(stage, "float32", tmp_path)[2].read_bytes() == b"text"


def test_a_failed_export_leaves_what_was_there(tiny_bert: Path, exported_copy: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_bert, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    before = load(exported_copy)
    with pytest.raises(CheckpointError):
        export(str(broken), exported_copy, EVERY)
    assert load(exported_copy) == before
    assert not list(exported_copy.glob(".partial-*"))


def test_a_killed_export_leaves_nothing_that_loads(tiny_bert: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "models", "export", str(tiny_bert), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("out/.partial-*/*")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    with pytest.raises(ManifestError, match="export the model first"):
        load(tmp_path / "out")
    with directory.locked(tmp_path / "out", lambda _: None):  # the next writer clears up
        assert not list(tmp_path.glob("out/.partial-*"))


def test_a_move_that_breaks_off_leaves_nothing_that_loads(exported_copy: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "a-folder").write_text("in the way")
    (exported_copy / "a-folder").mkdir()
    manifest = load(exported_copy)
    with pytest.raises(OSError, match="a-folder"):
        directory.replace(manifest, made, exported_copy)
    with pytest.raises(ManifestError, match="export the model first"):
        load(exported_copy)


def test_replacing_removes_our_stale_files_and_leaves_those_of_others(exported_copy: Path, tmp_path: Path) -> None:
    (exported_copy / "notes.txt").write_text("mine")
    manifest = load(exported_copy)
    stages = [stage for stage in manifest.stages if stage.name != "encode"]
    made = tmp_path / "made"
    made.mkdir()
    directory.replace(manifest.model_copy(update={"stages": tuple(stages)}), made, exported_copy)
    assert {path.name for path in exported_copy.iterdir()} == {"notes.txt", MANIFEST_NAME, "tokenizer.json", ".lock"}


def test_two_exports_of_one_directory_take_turns(tiny_bert: Path, exported_copy: Path) -> None:
    waiting = threading.Event()
    results: list[Exported] = []

    def second() -> None:
        results.append(export(str(tiny_bert), exported_copy, EVERY, lambda text: waiting.set() if "waiting" in text else None))

    with directory.locked(exported_copy, lambda _: None):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(timeout=20)
        assert not results
    thread.join(timeout=20)
    assert [result.written for result in results] == [False]


def test_a_full_disk_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    directory.check_space(tmp_path, 1)
    with pytest.raises(NotEnoughSpace, match="name another directory with --out"):
        directory.check_space(tmp_path, 1 << 60)
    needed = [needed_bytes(100 << 20, 0, p) for p in (("float32",), ("float16",), ("float32", "float16"), ("int8",))]
    assert 100 << 20 < needed[0] < needed[1] == needed[2] < needed[3]
    assert needed_bytes(100 << 20, 7, ("float32",)) == needed[0] + 7


def test_the_checkpoint_itself_is_never_written_to(tiny_bert: Path) -> None:
    with pytest.raises(ExportFailed, match="is the checkpoint itself"):
        export(str(tiny_bert), tiny_bert, EVERY)


def test_a_directory_that_cannot_be_made_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportFailed, match="cannot be written"):
        export(str(tiny_bert), tmp_path / "file" / "out", EVERY)
