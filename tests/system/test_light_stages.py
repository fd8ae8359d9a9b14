"""What a stage's image need not carry, and what a light stage may weigh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.house import house

IDLE_BYTES = 80 << 20
"""Resident memory of an idle light stage, at most: 80 MiB, of which the one with the vocabulary takes 77."""

NEVER = {"torch", "transformers", "onnx", "aiohttp", "cvxpy"}
"""Of no stage."""

IMPORTS = """
import sys
from pathlib import Path
from models import manifest
from services.stage import __main__, app
from services.stage.processors import open_processor
model = manifest.load(Path(sys.argv[1]))
spec = model.stage(sys.argv[2])
open_processor(spec, manifest.check_files(spec, "float32", Path(sys.argv[1])), 1)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("stage", "never"),
    [
        ("tokenise", NEVER | {"onnxruntime"}),
        ("pool", NEVER | {"onnxruntime", "tokenizers"}),
        ("classify", NEVER | {"onnxruntime", "tokenizers"}),
        ("rank", NEVER | {"onnxruntime", "tokenizers"}),
        ("encode", NEVER | {"tokenizers"}),
    ],
)
def test_a_stage_loads_only_what_it_needs(minilm: Path, stage: str, never: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(minilm), stage], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "services" in done.stdout.split()
    assert never & set(done.stdout.split()) == set()


async def test_an_idle_light_stage_stays_within_its_memory(minilm: Path) -> None:
    light = ("tokenise", "pool", "classify", "rank")
    async with house(minilm, dict.fromkeys(light, 1), []) as running:
        resident = {stage: running.processes[f"{stage}-0"].memory_info().rss for stage in light}
    assert {stage: size for stage, size in resident.items() if size > IDLE_BYTES} == {}, resident
