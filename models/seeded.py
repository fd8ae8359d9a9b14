"""The catalogue's checkpoints with seeded weights: built where they are first asked for, and kept.

Each is a real architecture in a stated configuration with random weights of a stated seed and a vocabulary trained on text that
is made for it, saved as any checkpoint is. They serve for building, measuring and testing where no trained checkpoint can be
had; their answers mean nothing, which the manifest, `espalier info` and the API's metadata say of them.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from models import directory
from models.directory import Report
from models.hugging_face import quiet

CATALOGUE: Mapping[str, str] = {
    "clip-tiny": "clip",
    "clip-small": "clip",
    "clip-vitb32": "clip",
    "classifier-ci": "classifier",
    "lm-ci": "language",
    "lm-demo": "language",
    "asr-ci": "speech",
    "asr-demo": "speech",
    "vlm-ci": "vision_language",
    "vlm-demo": "vision_language",
    "vlm-vitb32": "vision_language",
}
"""Name -> module of `models.presets` that builds it. `ci` and `tiny` are for tests, `small` and `demo` for a demonstration, and
`vitb32` has the size of the CLIP of that name."""
ROOT_VARIABLE = "ESPALIER_CHECKPOINTS"
MARK = "seeded.json"
"""In a checkpoint's directory: says that its weights are seeded."""
_RECIPE = ".recipe"
_LIBRARIES = ("tokenizers", "torch", "transformers")


def checkpoint_directory(name: str, report: Report = lambda _: None) -> Path:
    """Directory of a checkpoint of the catalogue, built first where it is missing or was built by other code.

    Raises:
        ExportFailed: the directory cannot be written.
    """
    root = Path(os.environ.get(ROOT_VARIABLE, "out/checkpoints"))
    there = root / name
    recipe = _recipe()
    if _made_by(there) == recipe:
        return there
    with directory.locked(root, report):
        if _made_by(there) == recipe:  # by the process that held the lock
            return there
        report(f"building the seeded checkpoint {name}")
        with directory.scratch(root) as scratch:
            made = scratch / name
            made.mkdir()
            with quiet():
                importlib.import_module(f"models.presets.{CATALOGUE[name]}").build(name, made)
            (made / MARK).write_text(json.dumps({"seed": 0}))
            (made / _RECIPE).write_text(recipe)
            shutil.rmtree(there, ignore_errors=True)
            made.replace(there)
    return there


def _made_by(there: Path) -> str | None:
    try:
        return (there / _RECIPE).read_text()
    except OSError:
        return None


def _recipe() -> str:
    """Fingerprint of what decides the bytes of a built checkpoint: the libraries and the presets' own code."""
    digest = hashlib.sha256(" ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES).encode())
    for path in sorted((Path(__file__).parent / "presets").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
