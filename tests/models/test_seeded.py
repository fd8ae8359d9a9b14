"""The catalogue's seeded checkpoints: the same each time, built once, found by name, and marked as what they are."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from models import seeded
from models.checkpoint import Checkpoint, load_model, load_tokenizer, resolve
from models.manifest import sha256


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's checkpoints are built."""
    monkeypatch.setenv(seeded.ROOT_VARIABLE, str(tmp_path / "checkpoints"))
    return tmp_path / "checkpoints"


def _content(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("name", "auto"), [("clip-tiny", "CLIPModel"), ("classifier-ci", "AutoModelForSequenceClassification")]
)
def test_a_name_of_the_catalogue_is_a_checkpoint_that_says_it_is_seeded(name: str, auto: str, root: Path) -> None:
    found = resolve(name)
    assert (found.name, found.weights) == (name, "seeded")
    assert found.source.startswith(f"{name}@")
    assert found.directory == (root / name).resolve()
    assert load_model(found, auto).config.model_type == found.config["model_type"]
    tokenizer = load_tokenizer(found)
    text = "A photo of a cat, أهلا 🦆"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_it_is_the_same_each_time(root: Path) -> None:
    first = _content(seeded.checkpoint_directory("clip-tiny"))
    (root / "clip-tiny" / ".recipe").write_text("other code")
    (root / "clip-tiny" / "left over").write_text("")
    assert _content(seeded.checkpoint_directory("clip-tiny")) == first


def test_what_is_there_is_left_and_two_at_once_build_it_once(root: Path) -> None:
    said: list[str] = []
    found: list[Checkpoint] = []

    def find() -> None:
        found.append(resolve("classifier-ci", said.append))

    threads = [threading.Thread(target=find) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sum("building" in text for text in said) == 1
    assert found[0] == found[1]
    assert not list(root.glob(".partial-*"))


def test_a_copy_of_one_says_so_too(root: Path, tmp_path: Path) -> None:
    directory = seeded.checkpoint_directory("classifier-ci")
    assert json.loads((directory / seeded.MARK).read_text()) == {"seed": 0}
    copy = directory.rename(tmp_path / "moved")
    assert resolve(str(copy)).weights == "seeded"
    (copy / seeded.MARK).unlink()
    assert resolve(str(copy)).weights == "trained"
    assert not (root / "classifier-ci").exists()


def test_every_name_has_its_module() -> None:
    here = Path(seeded.__file__).parent / "presets"
    assert {name for name, module in seeded.CATALOGUE.items() if not (here / f"{module}.py").is_file()} == set()
