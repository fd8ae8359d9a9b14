"""What several folders' tests share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# An example that takes long on a busy machine is no finding.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

MINILM = Path(__file__).parents[1] / "out" / "models" / "minilm"
"""Where `make demo` puts it too, so one export serves both."""


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, exported in both precisions by the command a user would give."""
    command = [sys.executable, "-m", "models", "export", "minilm", "--out", str(MINILM)]
    done = subprocess.run(
        [*command, "--precision", "float32", "--precision", "int8"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return MINILM
