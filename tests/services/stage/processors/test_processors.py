"""The table of processors: every entry opens to something, and a name that is not in it is told so."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from models.manifest import ManifestError, StageSpec, TensorSpec
from services.stage.processors import PROCESSORS, open_processor

X = TensorSpec(name="x", datatype="FP32", shape=("batch",))


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_every_entry_has_an_opener(name: str) -> None:
    assert callable(importlib.import_module(PROCESSORS[name]).open_processor)


def test_an_unknown_processor_lists_those_there_are() -> None:
    spec = StageSpec(name="s", tier="light", processor="divine", inputs=(X,), outputs=(X,))
    with pytest.raises(ManifestError, match=r"'s' wants processor 'divine'; this version has chat, classify, .*, tokenise"):
        open_processor(spec, (), 1)


def test_a_light_stage_loads_neither_onnxruntime_nor_another_ones_library() -> None:
    script = (
        "import sys, services.stage.processors, services.stage.processors.pool, services.stage.processors.classify;"
        "print([name for name in ('onnxruntime', 'tokenizers', 'torch', 'cvxpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
