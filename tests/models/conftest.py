"""Exports shared by the tests of models/, each made once: an export of even a tiny model takes seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from models import seeded
from models.export import Exported, Wanted, export
from models.manifest import load, save
from tests.models import tiny

# Models this small take several times as long on several threads, which wait for each other.
torch.set_num_threads(1)

EVERY = Wanted(precisions=("float32", "float16", "int8"), weights="seeded")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded BertModel checkpoint; not to be changed."""
    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_export(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Its export in both precisions; not to be changed."""
    return export(str(tiny_bert), tmp_path_factory.mktemp("exports") / "tiny-bert", EVERY)


@dataclass(frozen=True)
class Made:
    """An export, and what was told of its progress."""

    exported: Exported
    told: list[tuple[int, int]]


@pytest.fixture(scope="session")
def tiny_cut(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Its export in two parts; not to be changed."""
    told: list[tuple[int, int]] = []
    wanted = Wanted(precisions=("float32", "int8"), parts=2, weights="seeded")
    out = tmp_path_factory.mktemp("exports") / "tiny-bert-cut"
    return Made(export(str(tiny_bert), out, wanted, made=lambda done, total: told.append((done, total))), told)


def keep(directory: Path, *stages: str) -> None:
    """Forget the other stages of an export, and every precision of a core stage but float32: less to measure."""
    manifest = load(directory)
    kept = [stage.model_copy(update={"files": {"float32": stage.files["float32"]}}) for stage in map(manifest.stage, stages)]
    save(manifest.model_copy(update={"stages": tuple(kept)}), directory)


def edit(path: Path, **changes: Any) -> None:
    """Give entries of a JSON file other values."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def exported_copy(tiny_export: Exported, tmp_path: Path) -> Path:
    """A copy of the tiny export that a test may spoil."""
    return Path(shutil.copytree(tiny_export.directory, tmp_path / "export"))


@pytest.fixture(scope="session")
def seeded_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the catalogue's seeded checkpoints are built during these tests."""
    root = tmp_path_factory.mktemp("seeded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(seeded.ROOT_VARIABLE, str(root))
        yield root
