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


LIBRARIES = {"tokenizers", "PIL", "soundfile", "soxr", "jinja2"}
"""Of light stages, each of some."""
HEAVY = {"onnxruntime", "torch", "transformers", "onnx", "scipy", "cvxpy"}
"""Of none."""
OWN = {
    "tokenise": {"tokenizers"},
    "detokenise": {"tokenizers"},
    "image": {"PIL"},
    "log_mel": {"soundfile", "soxr"},
    "chat": {"jinja2"},
}


@pytest.mark.parametrize("name", sorted({"pool", "classify", "rank", "project", "match", "label", *OWN}))
def test_a_light_stage_loads_neither_onnxruntime_nor_another_ones_library(name: str) -> None:
    script = f"import sys, {PROCESSORS[name]}; print(*{{module.partition('.')[0] for module in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (HEAVY | LIBRARIES) & set(done.stdout.split()) == OWN.get(name, set())
