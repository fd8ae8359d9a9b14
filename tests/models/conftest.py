"""Exports shared by the tests of models/, each made once: an export of even a tiny model takes seconds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import seeded
from models.export import Exported, Wanted, export
from tests.models import tiny

EVERY = Wanted(precisions=("float32", "float16", "int8"), weights="seeded")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded BertModel checkpoint; not to be changed."""
    return tiny.build(tmp_path_factory.mktemp("checkpoints") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_export(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Its export in both precisions; not to be changed."""
    return export(str(tiny_bert), tmp_path_factory.mktemp("exports") / "tiny-bert", EVERY)


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
