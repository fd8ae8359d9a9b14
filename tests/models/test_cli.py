"""The command line: exit status, JSON on stdout and nothing else there, messages on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.__main__ import _steadiness, main
from models.manifest import ServiceLaw, ServicePoint, StageProfile, load, save
from tests.models.conftest import keep

REPOSITORY = Path(__file__).resolve().parents[2]


def test_export_says_up_to_date_and_prints_json_on_stdout_alone(
    tiny_bert: Path, exported_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["export", str(tiny_bert), "--out", str(exported_copy), "--weights", "seeded", "--precision", "int8", "-o", "json"]
    )
    shown = capsys.readouterr()
    assert status == 0
    document = json.loads(shown.out)
    assert document["written"] is False
    assert document["manifest"]["model"] == "tiny-bert"
    assert "up to date" in shown.err
    assert "encode" in shown.err


def test_a_name_of_the_catalogue_needs_no_directory_and_no_source(
    seeded_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del seeded_root
    words = ["--models-dir", str(tmp_path)]
    assert main(["export", "classifier-ci", *words, "--precision", "fp16", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["directory"] == str(tmp_path / "classifier-ci")
    assert document["manifest"]["weights"] == "seeded"
    stages = {stage["name"]: list(stage["files"]) for stage in document["manifest"]["stages"]}
    assert stages == {"tokenise": ["float32"], "encode": ["float16"], "label": ["float32"]}
    assert main(["verify", "classifier-ci", *words, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "bert-classifier"


def test_of_an_export_of_a_directory_the_source_must_be_said(exported_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(exported_copy)]) == 2
    assert "tiny-bert was exported from a directory" in " ".join(capsys.readouterr().err.split())


def test_more_parts_than_layers_are_refused(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_bert), "--out", str(tmp_path / "out"), "--cut", "3"]) == 2
    assert "2 layers cannot be cut into 3 parts" in capsys.readouterr().err


def test_verify_passes_and_fails_by_exit_status(
    tiny_bert: Path, exported_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(exported_copy), str(tiny_bert), "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert {figure["precision"] for figure in document["figures"]} == {"float32", "float16", "int8"}
    manifest = load(exported_copy)
    save(manifest.model_copy(update={"tolerances": {"float32": 0.0, "float16": 1.0, "int8": 1.0}}), exported_copy)
    assert main(["verify", str(exported_copy), str(tiny_bert)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "missed" in shown.err


def test_profile_prints_what_it_wrote(exported_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(exported_copy, "tokenise", "encode")
    assert main(["profile", str(exported_copy), "--quick", "--repeats", "1", "-o", "json"]) == 0
    shown = capsys.readouterr()
    encode = json.loads(shown.out)["stages"]["encode"]
    assert encode == load(exported_copy).model_dump(mode="json")["stages"][1]["profile"]
    assert [point["batch"] for point in encode["float32"]["points"]] == [1, 1, 4, 4]
    assert "t(u) =" in shown.err


@pytest.mark.parametrize(
    ("samples", "std_s", "said"),
    [
        (1, 0.0, "cv² unknown, too few undisturbed runs"),
        (6, 0.004, "cv² 0.0016, near deterministic"),
        (6, 0.02, "cv² 0.0400, not deterministic"),
    ],
)
def test_of_single_runs_nothing_is_said_about_how_they_vary(samples: int, std_s: float, said: str) -> None:
    point = ServicePoint(batch=1, length=8, samples=samples, mean_s=0.1, std_s=std_s, p50_s=0.1, p95_s=0.1, p99_s=0.1)
    law = ServiceLaw(base_s=0.0, per_unit_s=0.0125, tail_ratio=1.0)
    found = StageProfile(points=(point, point), law=law, resident_bytes=1, load_s=0.1, threads=1, cpu="a CPU")
    assert _steadiness(found).startswith(said)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "Usage"),
        (["exprot"], 2, "No such command"),
        (["export", "minilm", "--out", "x", "--precision", "float8"], 2, "'float8' is not one of fp32, fp16, int8"),
        (["export", "minilm", "--out", "x", "--cut", "0"], 2, "--cut"),
        (["export", "minilm", "--out", "x", "--opset", "12"], 2, "12"),
        (["export", "./nowhere", "--out", "x"], 2, "neither a directory"),
        (["verify", "nowhere", "minilm"], 2, "export the model first"),
        (["profile", "nowhere"], 2, "export the model first"),
        (["profile", "nowhere", "--threads", "0"], 2, "--threads"),
        (["--help"], 0, ""),
    ],
)
def test_bad_usage_is_status_2_and_says_what(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    shown = capsys.readouterr()
    assert message in " ".join(shown.err.split())
    assert "Traceback" not in shown.err


def test_a_set_up_that_fails_is_status_3(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["export", str(tiny_bert), "--out", str(tmp_path / "file" / "out")]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_an_interrupt_is_status_130(exported_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("models.profile.profile", interrupt)
    assert main(["profile", str(exported_copy)]) == 130


def test_it_runs_as_a_module(exported_copy: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "models", "verify", str(tmp_path / "nowhere"), "minilm"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "export the model first" in done.stderr
