"""The `docker` command line, as a user has it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LIMIT_S = 110.0
"""For what may build images (in the cache), export a model and start everything."""


def docker(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command; its standard output."""
    done = subprocess.run(
        ["docker", *arguments], cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"docker {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def labelled(label: str) -> list[str]:
    """Ids of all containers with a label, running or not."""
    return docker("ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={label}").split()


def program(container: str) -> psutil.Process:
    """The process that a container's init looks after, as the host sees it."""
    (child,) = psutil.Process(int(docker("inspect", "--format", "{{.State.Pid}}", container))).children()
    return child
