"""`espalier info`: what this machine and this installation are, without loading anything heavy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from orchestrator.state_dir import StateDir

PACKAGES = ("espalier", "fastapi", "uvicorn", "onnxruntime", "onnxruntime-gpu", "tokenizers", "torch", "transformers")
PROVIDERS = "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))"


def gather(states: Path) -> dict[str, Any]:
    """Versions, processors, execution providers, and the testbeds that are up below `states`."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "providers": _providers(),
        "state_dir": str(states),
        "up": _running(states),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    """Asked in a process of its own: onnxruntime has its one door in services/stage."""
    quiet = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    answer = subprocess.run([sys.executable, "-c", PROVIDERS], capture_output=True, text=True, check=False, env=quiet)
    found: list[str] = json.loads(answer.stdout) if answer.returncode == 0 else []
    return found


def _running(states: Path) -> dict[str, str]:
    daemons = [StateDir(path).read_daemon() for path in sorted(states.glob("*"))]
    return {daemon.testbed: daemon.url for daemon in daemons if daemon is not None and daemon.is_alive()}
