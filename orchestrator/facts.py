"""`espalier info`: what this machine and this installation are, without loading anything heavy."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from models import manifest as manifests
from models.manifest import ManifestError, Weights
from orchestrator.state_dir import StateDir
from services.dataplane import routes

PACKAGES = ("espalier", "fastapi", "uvicorn", "onnxruntime", "onnxruntime-gpu", "tokenizers", "torch", "transformers")
PROVIDERS = "import json, onnxruntime; print(json.dumps(onnxruntime.get_available_providers()))"


def gather(states: Path, models: Path) -> dict[str, Any]:
    """Versions, processors, execution providers, exported models below `models`, and what is up below `states`.

    Of every model, exported or served, it says whether its weights are trained or seeded.
    """
    up = _running(states)
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "providers": _providers(),
        "state_dir": str(states),
        "up": {testbed: url for testbed, (url, _) in up.items()},
        "models": _exported(models),
        "serving": {testbed: served for testbed, (_, served) in up.items()},
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


def _exported(models: Path) -> dict[str, Weights]:
    """Weights of every model there, by the name of its directory."""
    found: dict[str, Weights] = {}
    for path in sorted(models.glob(f"*/{manifests.MANIFEST_NAME}")):
        with contextlib.suppress(ManifestError):
            found[path.parent.name] = manifests.load(path.parent).weights
    return found


def _running(states: Path) -> dict[str, tuple[str, dict[str, Weights]]]:
    """By testbed, the address of its orchestrator and the weights of every model it serves."""
    found: dict[str, tuple[str, dict[str, Weights]]] = {}
    for state in map(StateDir, sorted(path for path in states.glob("*") if path.is_dir())):
        daemon = state.read_daemon()
        if daemon is not None and daemon.is_alive():
            published = routes.load(state.routes)
            services = published.services.values() if published is not None else ()
            found[daemon.testbed] = (daemon.url, {service.model: service.weights for service in services})
    return found
