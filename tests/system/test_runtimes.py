"""The same testbed file means the same thing under every runtime."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx

from tests.system.composed import TESTBED
from tests.system.edge import Edge, running

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "minilm_reference.json").read_text())


def test_processes_and_containers_are_placed_alike_and_give_the_same_answers(
    images: None, minilm: Path, tmp_path: Path
) -> None:
    found = {}
    for runtime in ("processes", "engine"):
        with running(Edge(tmp_path / runtime, minilm.parent, runtime, TESTBED)) as edge:
            edge.settle()
            found[runtime] = placement(edge), [answer(edge, text) for text in REFERENCE["texts"]]
            # What is left without its orchestrator goes down too.
            daemon = edge.state.read_daemon()
            assert daemon is not None
            os.kill(daemon.pid, signal.SIGKILL)
    assert found["processes"] == found["engine"]


def placement(edge: Edge) -> dict[str, list[tuple[str, str]]]:
    """Node and state of every replica, by service."""
    services = edge.status()["services"]
    return {name: sorted((r["node"], r["state"]) for r in service["replicas"]) for name, service in services.items()}


def answer(edge: Edge, text: str) -> Any:
    """What the pipeline says of a text."""
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]}
    found = httpx.post(f"{edge.url}/v2/models/embed/infer", json=body, trust_env=False, timeout=20)
    assert found.status_code == 200, found.text
    return found.json()["outputs"]
